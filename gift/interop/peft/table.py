"""All forms that can be read and written."""

from gift.interop.peft.adalora import ADALORA_FORM
from gift.interop.peft.as_others import PVERA_FORM, UNILORA_FORM, VBLORA_FORM
from gift.interop.peft.blocks import C3A_FORM, GRALORA_FORM, MISS_FORM
from gift.interop.peft.deft import DEFT_FORM
from gift.interop.peft.forms import Form
from gift.interop.peft.glora import GLORA_FORM
from gift.interop.peft.lora import LORA_FORM
from gift.interop.peft.oft import BOFT_FORM, OFT_FORM
from gift.interop.peft.products import LOHA_FORM, LOKR_FORM
from gift.interop.peft.road import ROAD_FORM
from gift.interop.peft.scaled_factors import DELORA_FORM, HIRA_FORM
from gift.interop.peft.scaling import IA3_FORM, VERA_FORM
from gift.interop.peft.tokens import TOKENS_FORM
from gift.interop.peft.wavelets import WAVEFT_FORM

FORMS: dict[str, Form] = {
    form.peft_type: form
    for form in (
        LORA_FORM, LOHA_FORM, LOKR_FORM, IA3_FORM, VERA_FORM, OFT_FORM, BOFT_FORM, C3A_FORM,
        DELORA_FORM, GRALORA_FORM, HIRA_FORM, MISS_FORM, ROAD_FORM, TOKENS_FORM, WAVEFT_FORM,
        ADALORA_FORM, DEFT_FORM, GLORA_FORM, PVERA_FORM, UNILORA_FORM, VBLORA_FORM,
    )
}  # fmt: skip
