"""Methods: functions of a frozen matrix, one file and one line here each.

Methods know neither layers nor modules.
"""

from gift.errors import AdaptationError as AdaptationError
from gift.methods.base import METHODS as METHODS
from gift.methods.base import Method as Method
from gift.methods.base import method_of as method_of
from gift.methods.base import register_method as register_method
from gift.methods.boft import BOFT as BOFT
from gift.methods.dora import DoRA as DoRA
from gift.methods.fourierft import FourierFT as FourierFT
from gift.methods.hra import HRA as HRA
from gift.methods.ia3 import IA3 as IA3
from gift.methods.loha import LoHa as LoHa
from gift.methods.lokr import LoKr as LoKr
from gift.methods.lora import LoRA as LoRA
from gift.methods.lora import RsLoRA as RsLoRA
from gift.methods.lora_fa import LoRAFA as LoRAFA
from gift.methods.oft import OFT as OFT
from gift.methods.olora import OLoRA as OLoRA
from gift.methods.pissa import PiSSA as PiSSA
from gift.methods.shira import SHiRA as SHiRA
from gift.methods.svdiff import SVDiff as SVDiff
from gift.methods.vera import VeRA as VeRA
