"""Readers of sounds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gift.errors import DataError, closest, first_line
from gift.support.optional import require

FEATURES = ("waveform", "mel")
LONGEST = 3600.0
"""Largest number of seconds of a clip."""


@dataclass(frozen=True)
class AudioReader:
    """Converts sounds to tensors of one length, for networks of your own.

    Sounds, or sound files, are mixed to one channel, resampled, and cut or filled with silence. The
    first seconds are kept, for training random ones.

    Args:
        rate: samples of a second, in Hz.
        seconds: length of a clip.
        features: "waveform" (1, samples), or "mel", the logarithm of a mel spectrogram
            (1, mels, frames), standardised for each clip.
        mels: number of bands of "mel", from 0 Hz to half the rate.
        window: samples of a window of "mel".
        hop: samples between two windows of "mel".

    Raises:
        ValueError: naming all settings that are out of range.

    Example:
        >>> import torch
        >>> from gift.data import AudioReader
        >>> reader = AudioReader(rate=8000, seconds=0.5)
        >>> reader((torch.ones(800), 8000)).shape, AudioReader(features="mel")([0.1] * 9).shape
        (torch.Size([1, 4000]), torch.Size([1, 64, 501]))
    """

    kind: ClassVar[str] = "audio"
    stands_alone: ClassVar[bool] = True

    rate: int = 16000
    seconds: float = 5.0
    features: str = "waveform"
    mels: int = 64
    window: int = 400
    hop: int = 160

    def __post_init__(self) -> None:
        problems = [_wrong_length(self.seconds)] if _wrong_length(self.seconds) else []
        for name, most in (("rate", 2**20), ("mels", 1024), ("window", 2**16), ("hop", 2**16)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                problems.append(f"{name} is {value!r}, expected a whole number from 1 to {most}")
        if self.features not in FEATURES:
            problems.append(f"features is {self.features!r}, expected one of {FEATURES}")
        if problems:
            raise ValueError("; ".join(problems))
        if self.samples < 1 or (self.features == "mel" and self.samples < self.window):
            raise ValueError(f"{self.seconds} seconds at {self.rate} Hz are too short")

    @property
    def samples(self) -> int:
        """The number of samples of a clip."""
        return round(self.seconds * self.rate)

    def __call__(self, raw: Any) -> Tensor:
        """Convert a sound file, samples, or a pair of samples and their rate.

        Raises:
            DataError: if it cannot be read.
        """
        return self._converted(clip(raw, self.rate, self.seconds))

    def augmented(self, raw: Any) -> Tensor:
        """Convert a random part of the sound, if it is longer than a clip."""
        return self._converted(clip(raw, self.rate, self.seconds, at_random=True))

    def _converted(self, wave: Tensor) -> Tensor:
        wave = torch.nn.functional.pad(wave, (0, self.samples - len(wave)))
        if self.features == "waveform":
            return wave[None]
        shape = torch.hann_window(self.window)
        spectrum = torch.stft(
            wave, self.window, self.hop, window=shape, center=True, return_complex=True
        )
        bands = mel_bands(self.mels, self.window // 2 + 1, self.rate) @ spectrum.abs().square()
        logs = bands.clamp_min(1e-10).log()
        return ((logs - logs.mean()) / logs.std().clamp_min(1e-5))[None]

    def collate(self, items: Sequence[Tensor]) -> Tensor:
        """Stack the tensors."""
        return torch.stack(list(items))

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`."""
        return {"kind": self.kind} | dataclasses.asdict(self)


@dataclass(frozen=True)
class ExtractorReader:
    """Converts sounds by a feature extractor of transformers, as its networks expect them.

    Args:
        extractor: settings of the feature extractor as plain data, with its class as
            "feature_extractor_type"; also the extractor itself, or its name or folder.
        seconds: length after which a sound is cut. Shorter ones are filled as the extractor does.

    Raises:
        DataError: if there is no such extractor.
        ValueError: if `seconds` is out of range.
    """

    kind: ClassVar[str] = "extractor"
    stands_alone: ClassVar[bool] = True

    extractor: Any
    seconds: float = 10.0
    made: Any = field(init=False, compare=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if problem := _wrong_length(self.seconds):
            raise ValueError(problem)
        given = self.extractor
        if isinstance(given, str | Path):
            given = load_extractor(given)
        if not isinstance(given, Mapping):
            if not hasattr(given, "to_dict") or not hasattr(given, "sampling_rate"):
                raise DataError(
                    f"the extractor is a {type(given).__name__}, expected a feature extractor of "
                    "transformers, or its name or folder"
                )
            plain = {"feature_extractor_type": type(given).__name__} | given.to_dict()
            given = {key: value for key, value in plain.items() if _is_plain(value)}
        object.__setattr__(self, "extractor", dict(given))
        object.__setattr__(self, "made", _made(self.extractor))

    @property
    def rate(self) -> int:
        """The samples of a second, in Hz."""
        return int(self.made.sampling_rate)

    def __call__(self, raw: Any) -> dict[str, Tensor]:
        """Convert a sound file, samples, or a pair of samples and their rate.

        Raises:
            DataError: if it cannot be read.
        """
        return self._converted(clip(raw, self.rate, self.seconds))

    def augmented(self, raw: Any) -> dict[str, Tensor]:
        """Convert a random part of the sound, if it is longer."""
        return self._converted(clip(raw, self.rate, self.seconds, at_random=True))

    def _converted(self, wave: Tensor) -> dict[str, Tensor]:
        found = self.made(wave.numpy(), sampling_rate=self.rate, return_tensors="pt")
        return {key: value[0] for key, value in found.items()}

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad to the longest sound, and return tensors."""
        if all(len({item[key].shape for item in items}) == 1 for key in items[0]):
            return {key: torch.stack([item[key] for item in items]) for key in items[0]}
        plain = [{key: value.numpy() for key, value in item.items()} for item in items]
        return dict(self.made.pad(plain, padding=True, return_tensors="pt"))

    def to_config(self, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the reader as plain data; see `reader_from_config`."""
        return {"kind": self.kind, "extractor": dict(self.extractor), "seconds": self.seconds}


def load_extractor(name: str | Path) -> Any:
    """Load the feature extractor of that name, or from that folder.

    Raises:
        DataError: if it cannot be loaded.
    """
    try:
        return require("transformers", "text").AutoFeatureExtractor.from_pretrained(
            str(name), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"there is no feature extractor {str(name)!r} here, and it cannot be fetched: give a "
            f"folder that save_pretrained wrote ({type(error).__name__}: {first_line(error)})"
        ) from error


def _made(settings: Mapping[str, Any]) -> Any:
    """Make the extractor of transformers that plain data describe, which run no code."""
    transformers = require("transformers", "text")
    auto = require("transformers.models.auto.feature_extraction_auto", "text")
    known = {name for names in auto.FEATURE_EXTRACTOR_MAPPING_NAMES.values()
             for name in ([names] if isinstance(names, str) else names)}  # fmt: skip
    name = settings.get("feature_extractor_type")
    made = getattr(transformers, str(name), None) if str(name) in known else None
    if made is None or not hasattr(made, "pad"):
        raise DataError(
            f"there is no feature extractor {name!r:.60} of sounds in transformers, closest: "
            f"{closest(name, known)}"
        )
    if not all(map(_is_plain, settings.values())):
        raise DataError("the settings of the feature extractor are not plain numbers and texts")
    own = {key: value for key, value in settings.items() if key != "feature_extractor_type"}
    try:
        return made.from_dict(own)
    except Exception as error:  # a file may say anything
        raise DataError(f"{name} cannot be made with {own!r:.200}: {error}") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(map(_is_plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= 2**24
    return value is None or isinstance(value, str | bool)


def _wrong_length(seconds: Any) -> str:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if number and 0 < seconds <= LONGEST:
        return ""
    return f"seconds is {seconds!r}, expected a number above 0, up to {LONGEST:.0f}"


def clip(raw: Any, rate: int, seconds: float, at_random: bool = False) -> Tensor:
    """Return at most these seconds of a sound, of one channel, at a rate.

    Args:
        raw: path of a sound file; samples (samples,) or (samples, channels) at this rate; a pair of
            samples and their rate; or a dictionary of "array" and "sampling_rate".
        rate: samples of a second, in Hz.
        seconds: largest length.
        at_random: whether to take a random part, not the first.

    Raises:
        DataError: if it cannot be read.
    """
    if isinstance(raw, str | Path):
        samples, own = _read(Path(raw), seconds, at_random)
        what = str(raw)
    else:
        samples, own = _samples(raw, rate)
        what = "the sound"
        most = math.ceil(seconds * own)
        start = _start(len(samples), most, at_random)
        samples = samples[start : start + most]
    if not len(samples):
        raise DataError(f"{what} has no samples")
    if not bool(samples.isfinite().all()):
        raise DataError(f"{what} has samples that are not finite (nan, inf)")
    if own != rate:
        soxr = require("soxr", "audio")
        samples = torch.from_numpy(soxr.resample(samples.numpy(), own, rate))
    return samples[: round(seconds * rate)]


def _start(length: int, most: int, at_random: bool) -> int:
    return int(torch.randint(max(length - most, 0) + 1, ())) if at_random else 0


def _read(path: Path, seconds: float, at_random: bool) -> tuple[Tensor, int]:
    """Return the part of a sound file that is needed, and its rate."""
    soundfile = require("soundfile", "audio")
    if not path.is_file():
        raise DataError(f"{path} cannot be read as sound: there is no such file")
    try:
        with soundfile.SoundFile(str(path)) as file:
            most = math.ceil(seconds * file.samplerate)
            file.seek(_start(file.frames, most, at_random))
            values = file.read(most, dtype="float32", always_2d=True)
            return torch.from_numpy(values).mean(1), int(file.samplerate)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as sound: {first_line(error)}") from error


def _samples(raw: Any, rate: int) -> tuple[Tensor, int]:
    """Return samples in memory, of one channel, and their rate."""
    if isinstance(raw, Mapping):
        raw = raw.get("array"), raw.get("sampling_rate")
    is_pair = isinstance(raw, tuple) and len(raw) == 2
    values, own = raw if is_pair else (raw, rate)
    try:
        samples = torch.as_tensor(values, dtype=torch.float32)
        own = int(own)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected a sound file, or samples and their rate, got {raw!r:.60}"
        ) from error
    if samples.dim() not in (1, 2) or not 1 <= own <= 2**20:
        raise DataError(
            f"expected samples (samples,) or (samples, channels), and their rate in Hz, got "
            f"{list(samples.shape)} at {own}"
        )
    return (samples.mean(1) if samples.dim() == 2 else samples), own


@lru_cache(maxsize=8)
def mel_bands(mels: int, bins: int, rate: int) -> Tensor:
    """Return triangular filters (mels, bins), evenly spaced in mel by the formula of HTK.

    A frequency of f Hz is 2595 log10(1 + f / 700) mel.
    """
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, highest, mels + 2, dtype=torch.float64) / 2595) - 1)
    at = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (at - low) / (mid - low), (high - at) / (high - mid)
    return torch.minimum(rising, falling).clamp_min(0).float()
