"""Methods: functions of a frozen matrix, one file and one line here each.

Methods know neither layers nor modules.
"""

from gift.errors import AdaptationError as AdaptationError
from gift.methods.adalora import AdaLoRA as AdaLoRA
from gift.methods.base import METHODS as METHODS
from gift.methods.base import Method as Method
from gift.methods.base import method_of as method_of
from gift.methods.base import register_method as register_method
from gift.methods.boft import BOFT as BOFT
from gift.methods.c3a import C3A as C3A
from gift.methods.deft import DEFT as DEFT
from gift.methods.delora import DeLoRA as DeLoRA
from gift.methods.dora import DoRA as DoRA
from gift.methods.fact import FacT as FacT
from gift.methods.fourierft import FourierFT as FourierFT
from gift.methods.full_delta import FullDelta as FullDelta
from gift.methods.glora import GLoRA as GLoRA
from gift.methods.gralora import GraLoRA as GraLoRA
from gift.methods.guided import GuidedLoRA as GuidedLoRA
from gift.methods.hira import HiRA as HiRA
from gift.methods.hra import HRA as HRA
from gift.methods.ia3 import IA3 as IA3
from gift.methods.loha import LoHa as LoHa
from gift.methods.lokr import LoKr as LoKr
from gift.methods.lora import LoRA as LoRA
from gift.methods.lora import RsLoRA as RsLoRA
from gift.methods.lora_fa import LoRAFA as LoRAFA
from gift.methods.miss import MiSS as MiSS
from gift.methods.oft import OFT as OFT
from gift.methods.olora import OLoRA as OLoRA
from gift.methods.pissa import PiSSA as PiSSA
from gift.methods.principal import PSOFT as PSOFT
from gift.methods.principal import LoRAXS as LoRAXS
from gift.methods.randlora import RandLoRA as RandLoRA
from gift.methods.road import RoAd as RoAd
from gift.methods.shira import SHiRA as SHiRA
from gift.methods.ssf import SSF as SSF
from gift.methods.svdiff import SVDiff as SVDiff
from gift.methods.tinylora import TinyLoRA as TinyLoRA
from gift.methods.trainable_tokens import TrainableTokens as TrainableTokens
from gift.methods.unilora import UniLoRA as UniLoRA
from gift.methods.vblora import VBLoRA as VBLoRA
from gift.methods.vera import VeRA as VeRA
from gift.methods.waveft import WaveFT as WaveFT
