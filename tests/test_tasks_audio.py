"""Sounds: what is read, cut, resampled and refused; transformers' networks and own ones."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly
from torch import nn

from gift import enable_fine_tuning
from gift.data import (
    AudioReader,
    DataError,
    ExtractorReader,
    audio_folders,
    audio_table,
    reader_from_config,
)
from gift.data.readers.sounds import clip, mel_bands
from gift.jobs import Job, Run, run_job
from gift.strategies import FullFineTuningStrategy, HeadReplacementStrategy
from gift.training import finetune, predict
from gift.zoo import load_network
from tests.job_examples import CHEAP

RATE = 8000
QUIET: dict[str, Any] = {"device": "cpu", "progress": False}


def voice(kind: int, seed: int, seconds: float = 0.6, rate: int = RATE) -> np.ndarray:
    """A vowel, a buzz of a random pitch through two formants, those of "a" or "i", and noise."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch, formants = draw.uniform(90, 220), ((750, 1200), (300, 2300))[kind]
    wave = np.zeros_like(time)
    for harmonic in range(1, int(rate / 2 / pitch)):
        at = harmonic * pitch
        strength = sum(1 / (1 + ((at - f) / 80) ** 2) for f in formants)
        wave += strength * np.sin(2 * math.pi * at * time + draw.uniform(0, 6))
    wave += draw.normal(0, 0.05, len(time))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def folders(path: Path, count: int = 4, start: int = 0, form: str = "wav") -> Path:
    for kind, name in enumerate("ai"):
        (path / name).mkdir(parents=True)
        for n in range(start, start + count):
            soundfile.write(path / name / f"{n}.{form}", voice(kind, 2 * n + kind), RATE)
    return path


class Net(nn.Sequential):
    """Convolutions on a mel spectrogram."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d((8, 1)), nn.Flatten(), nn.Linear(64, 2),
        )  # fmt: skip


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_files_of_each_format_are_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{form}"
    wave = voice(0, 0)
    soundfile.write(path, wave, RATE)
    found = clip(path, RATE, 1.0).numpy()
    assert len(found) == pytest.approx(
        len(wave), abs=0 if form in ("wav", "flac", "aiff") else 2000
    )
    part = slice(1000, 4000)
    assert np.corrcoef(found[part], wave[part])[0, 1] > 0.9


def test_sounds_are_mixed_resampled_cut_and_filled(tmp_path: Path) -> None:
    """Resampled as by scipy's polyphase filter, which is another one."""
    reader = AudioReader(rate=16000, seconds=0.5)
    wave = voice(1, 3, rate=RATE)
    stereo = np.stack([wave * 0.5, wave * 1.5], 1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    found = reader(tmp_path / "a.wav")
    assert found.shape == (1, 8000)
    expected = resample_poly(wave, 2, 1)[:8000]
    assert np.abs(found[0].numpy() - expected)[100:-100].max() < 0.03
    assert torch.equal(reader((stereo, RATE)), found)
    assert torch.equal(reader({"array": stereo, "sampling_rate": RATE}), found)
    short = reader((wave[:800], RATE))
    assert short[0, 1610:].abs().max() == 0
    assert short[0, :1590].abs().max() > 0
    plain = AudioReader(rate=RATE, seconds=0.1)
    assert torch.equal(plain(wave.tolist())[0], torch.tensor(wave[:800]))


def test_training_takes_random_parts_of_long_sounds() -> None:
    reader = AudioReader(rate=100, seconds=0.1)
    ramp = torch.arange(100.0)
    starts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        part = reader.augmented((ramp, 100))[0]
        assert torch.equal(part, part[0] + torch.arange(10.0))
        starts.add(part[0].item())
    assert len(starts) > 10
    assert torch.equal(reader.augmented((ramp[:10], 100)), reader((ramp[:10], 100)))


def test_mel_spectrograms_are_those_of_transformers() -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bands = mel_filter_bank(201, 32, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_bands(32, 201, 16000).numpy(), bands.T, atol=2e-6)
    wave = voice(0, 1, rate=16000)
    power = spectrogram(
        wave, window_function(400, "hann"), 400, 160, power=2.0, mel_filters=bands,
        mel_floor=1e-10, log_mel="log",
    )  # fmt: skip
    expected = (power - power.mean()) / power.std(ddof=1)
    found = AudioReader(16000, 0.6, "mel", mels=32)(wave)[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-2)


def test_a_job_tells_vowels_apart(tmp_path: Path) -> None:
    job = Job(
        data={"kind": "audio_folders", "train": str(folders(tmp_path / "train", 16)),
              "valid": str(folders(tmp_path / "val", 6, 100, "flac")),
              "reader": {"rate": RATE, "seconds": 0.5, "features": "mel", "mels": 32}},
        strategy="FullFineTuningStrategy", folder=str(tmp_path / "run"),
        training=CHEAP | {"epochs": 8, "lr": 0.01, "batch_size": 8},
    )  # type: ignore[arg-type]  # fmt: skip
    torch.manual_seed(0)
    result = run_job(job, Net())
    assert result.after["accuracy"] > 0.9
    run = Run(tmp_path / "run", Net())
    assert run.classes == ("a", "i")
    assert (run.reader.rate, run.reader.mels) == (RATE, 32)
    wave = voice(1, 999, rate=16000)
    assert [one.label for one in run.predict([(wave, 16000)])] == ["i"]
    path = tmp_path / "one.wav"
    soundfile.write(path, voice(0, 998), RATE)
    assert run.predict([str(path)])[0].label == "a"


def test_a_table_of_sounds_with_numbers(tmp_path: Path) -> None:
    folders(tmp_path, 2)
    table = tmp_path / "t.csv"
    table.write_text("path,label\na/0.wav,0.5\ni/1.wav,2\n")
    found = audio_table(table, AudioReader(RATE, 0.1), task="regression")
    assert [found.dataset[n][1] for n in range(2)] == [0.5, 2.0]
    table.write_text("path,label\na/0.wav,0.5\na/7.wav,2\nb/1.wav,2\n")
    with pytest.raises(DataError, match=r"(?s)line 3: there is no sound .*7.wav.*line 4"):
        audio_table(table, AudioReader(RATE, 0.1), task="regression")


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    reader = AudioReader(RATE, 0.1)
    (tmp_path / "a.wav").write_bytes(b"RIFF no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), RATE)
    nan = np.full(900, np.nan, np.float32)
    soundfile.write(tmp_path / "nan.wav", nan, RATE, subtype="FLOAT")
    for raw, message in {
        tmp_path / "a.wav": "a.wav cannot be read as sound",
        str(tmp_path / "none.wav"): "none.wav cannot be read as sound: there is no such file",
        tmp_path / "empty.wav": "empty.wav has no samples",
        tmp_path / "nan.wav": "nan.wav has samples that are not finite",
        5: "expected",
        ((), RATE): "no samples",
        ("x", RATE): "expected a sound file, or samples",
        (torch.zeros(2, 2, 2), RATE): r"expected samples \(samples,\)",
        (torch.zeros(5), 0): r"expected samples",
        (torch.zeros(5), "x"): r"expected a sound file",
    }.items():
        with pytest.raises(DataError, match=message):
            reader(raw)
    (tmp_path / "data/x").mkdir(parents=True)
    with pytest.raises(DataError, match=r"(?s)no sounds in it \(.aif.*"):
        audio_folders(tmp_path / "data", reader, classes=["x", "y"])


@pytest.mark.parametrize(
    "settings",
    [{"rate": 0}, {"rate": 1.5}, {"seconds": 0}, {"seconds": math.inf}, {"features": "cepstrum"},
     {"mels": 0}, {"hop": 0}, {"seconds": 1e-9}, {"features": "mel", "seconds": 0.01}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|too short"):
        AudioReader(**settings)
    with pytest.raises(DataError, match=r"expected|too short"):
        reader_from_config({"kind": "audio"} | settings)


def test_the_reader_is_plain_data() -> None:
    reader = AudioReader(RATE, 0.5, "mel", 40)
    assert reader_from_config(json.loads(json.dumps(reader.to_config()))) == reader


# Networks of transformers.


def wav2vec2(folder: Path) -> None:
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForSequenceClassification,
    )

    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(8, 8), conv_kernel=(8, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, mask_time_prob=0.0,
    )  # fmt: skip
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)


def ast(folder: Path) -> None:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    config = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_length=64, num_mel_bins=32,
    )  # fmt: skip
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)


def whisper(folder: Path) -> None:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

    config = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=80,
        max_source_positions=50, classifier_proj_size=8,
    )  # fmt: skip
    WhisperForAudioClassification(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(folder)


@pytest.mark.parametrize("make", [wav2vec2, ast, whisper])
def test_networks_of_transformers_by_name(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "model")
    loaded = load_network(f"transformers:{tmp_path / 'model'}", reader={"seconds": 0.5})
    assert isinstance(loaded.reader, ExtractorReader)
    assert loaded.task == "classification"
    data = audio_folders(folders(tmp_path / "data"), loaded.reader)
    result = finetune(loaded.net, data, data, strategy=HeadReplacementStrategy(2), epochs=1,
                      batch_size=4, **QUIET)  # fmt: skip
    head = loaded.net.classifier if hasattr(loaded.net.classifier, "out_features") else (
        loaded.net.classifier.dense)  # type: ignore[union-attr]  # fmt: skip
    assert head.out_features == 2
    assert result.trained == sum(p.numel() for p in head.parameters())
    again = reader_from_config(json.loads(json.dumps(loaded.reader.to_config())))
    assert again == loaded.reader
    one, other = (predict(loaded.net, [(voice(0, 5), RATE)], reader=reader)[0]
                  for reader in (loaded.reader, again))  # fmt: skip
    assert one.probabilities == other.probabilities
    assert one.label in ("a", "i")


def test_waves_of_several_lengths_are_padded_by_the_extractor() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    reader = ExtractorReader(extractor, seconds=1.0)
    waves = [voice(0, 1, 0.2, 16000), voice(1, 2, 0.4, 16000)]
    found = reader.collate([reader((wave, 16000)) for wave in waves])
    expected = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
    for key, value in expected.items():
        assert torch.allclose(found[key].float(), value.float(), atol=1e-6)


@pytest.mark.parametrize(
    ("extractor", "message"),
    [
        ({"feature_extractor_type": "Trainer"}, "no feature extractor 'Trainer'"),
        ({"feature_extractor_type": ["x"]}, "no feature extractor"),
        ({}, "no feature extractor None"),
        (
            {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "x": object()},
            "not plain numbers",
        ),
        ("no/such", "no feature extractor 'no/such' here"),
        (5, "expected a feature extractor"),
    ],
)
def test_extractors_that_files_make_up_are_refused(extractor: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ExtractorReader(extractor)


def test_the_head_of_a_wave_network_is_found() -> None:
    net = nn.Sequential(nn.Conv1d(1, 4, 9), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 9))
    enable_fine_tuning(net, HeadReplacementStrategy(2))
    assert net(torch.zeros(1, 1, 99)).shape == (1, 2)
    assert FullFineTuningStrategy
