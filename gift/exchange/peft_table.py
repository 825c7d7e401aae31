"""All forms that are read and written."""

from gift.exchange.peft_forms import Form
from gift.exchange.peft_lora import LORA_FORM
from gift.exchange.peft_oft import OFT_FORM
from gift.exchange.peft_products import LOHA_FORM, LOKR_FORM
from gift.exchange.peft_scaling import IA3_FORM, VERA_FORM

FORMS: dict[str, Form] = {
    form.peft_type: form
    for form in (LORA_FORM, LOHA_FORM, LOKR_FORM, IA3_FORM, VERA_FORM, OFT_FORM)
}
