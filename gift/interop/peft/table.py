"""All forms that can be read and written."""

from gift.interop.peft.forms import Form
from gift.interop.peft.lora import LORA_FORM
from gift.interop.peft.oft import BOFT_FORM, OFT_FORM
from gift.interop.peft.products import LOHA_FORM, LOKR_FORM
from gift.interop.peft.scaling import IA3_FORM, VERA_FORM

FORMS: dict[str, Form] = {
    form.peft_type: form
    for form in (LORA_FORM, LOHA_FORM, LOKR_FORM, IA3_FORM, VERA_FORM, OFT_FORM, BOFT_FORM)
}
