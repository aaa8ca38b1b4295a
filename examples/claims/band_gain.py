"""A recording through equalizers: what is left of their gains after a norm of their bands, and of other bands."""

import wave
from pathlib import Path

import torch
import torchaudio
from claim import FAILS, HOLDS, IN_PART, Claim, tell

from flexnorm import Partition
from flexnorm.spectrograms import MelBandNorm, hz_bands, mel_bands

SPEECH = Path(__file__).parents[1] / "data" / "speech.wav"
BANDS, N_FFT, MELS, SEEDS = 6, 1024, 80, range(5)

with wave.open(str(SPEECH)) as recording:
    rate = recording.getframerate()
    samples = torch.frombuffer(bytearray(recording.readframes(recording.getnframes())), dtype=torch.int16) / 32768
torch.manual_seed(0)
samples = samples + 1e-3 * torch.randn_like(samples)  # of a microphone

# --- bands of the equalizer, on the axes of bins and of mels ---------------------------------------------------------
bins = mel_bands(N_FFT // 2 + 1, BANDS, rate)
width = rate / N_FFT
edges = ((bins.offsets[1:-1] - 0.5) * width).tolist()  # Hz
mels = hz_bands(edges, sample_rate=rate, n_mels=MELS)
AXES = {
    "bins": (torchaudio.transforms.Spectrogram(N_FFT, hop_length=160), bins),
    "mels": (torchaudio.transforms.MelSpectrogram(rate, N_FFT, hop_length=160, n_mels=MELS), mels),
}
DECIBELS = torchaudio.transforms.AmplitudeToDB()


def equalized(gains):
    """The sound itself, of which each band is louder by so many dB."""
    hz = torch.fft.rfftfreq(len(samples), 1 / rate)
    gain = gains[torch.bucketize(hz, torch.tensor(edges))]
    return torch.fft.irfft(torch.fft.rfft(samples) * 10 ** (gain / 20), n=len(samples))


def across(bands):
    """As many bands, whose edges lie in the middle of these."""
    middles = (bands.offsets[1:-2] + bands.offsets[2:-1]) // 2
    return Partition.from_offsets([0, *middles.tolist(), len(bands.ids)])


def inside(bands):
    """Without the two frequencies on either side of an edge, which hear both of its bands."""
    kept = torch.ones(len(bands.ids), dtype=torch.bool)
    for edge in bands.offsets[1:-1].tolist():
        kept[edge - 2 : edge + 2] = False
    return kept


def relative(found, truth):
    return ((found - truth).square().mean() / truth.var()).sqrt().item()


def changes(axis, feature, norm):
    """How features change with every equalizer: put on the spectrogram, on the sound, and of that off the edges."""
    spectrogram, bands = AXES[axis]
    power = spectrogram(samples)[None]
    found = []
    with torch.no_grad():
        before = norm(feature(power))[0]
        for seed in SEEDS:
            gains = 24 * torch.rand(BANDS, generator=torch.Generator().manual_seed(seed)) - 12
            put = norm(feature(power * 10 ** (gains[bands.ids, None] / 10)))[0]
            heard = norm(feature(spectrogram(equalized(gains))[None]))[0]
            where = inside(bands)
            found.append([relative(put, before), relative(heard, before), relative(heard[where], before[where])])
    return torch.tensor(found)


FEATURES = {"dB": DECIBELS, "power": lambda t: t, "power, 60 dB lower": lambda t: 1e-6 * t}
NORMS = {
    "one for all": lambda bands: MelBandNorm([len(bands.ids)]),
    "other bands": lambda bands: MelBandNorm(across(bands)),
    "these bands": MelBandNorm,
}
SMALL = 0.01  # of the deviation: some 0.1 dB
rows, found = [], {}
for axis, (_, bands) in AXES.items():
    for feature in FEATURES:
        for norm in NORMS if "lower" not in feature else ["these bands"]:
            runs = changes(axis, FEATURES[feature], NORMS[norm](bands))
            found[axis, feature, norm] = runs.mean(0).tolist()
            both = zip(runs.mean(0).tolist(), runs.amax(0).tolist(), strict=True)
            cells = [f"{mean:.0%}, at most {most:.0%}" if most > SMALL else "< 1%" for mean, most in both]
            rows.append((axis, feature, norm, *cells))

loud = [(axis, feature) for axis in AXES for feature in ("dB", "power")]
removed = all(found[(*case, "these bands")][0] <= SMALL for case in loud)
breaks = all(found[(*case, "other bands")][0] >= 10 * SMALL for case in loud)
# a tenth of what one norm for all leaves: the equalizer is gone for most purposes
heard = all(found[(*case, "these bands")][1] <= found[(*case, "one for all")][1] / 10 for case in loud)
quiet = all(runs[0] <= SMALL for (_, feature, _), runs in found.items() if "lower" in feature)
log, power = (found["mels", feature, "these bands"] for feature in ("dB", "power"))
other = min(found[(*case, "other bands")][0] for case in loud)

tell(
    Claim(
        title="Gains of bands in audio",
        says="Group norm of mel bands, each by itself over time, normalizes for loudness that varies differently in "
        "different ranges of frequency.",
        source="told of group norm in audio",
        expected=f"Speech of {len(samples) / rate:.1f} s, five equalizers with gains of -12 to 12 dB in {BANDS} "
        "bands. Put on the spectrogram, a gain is a factor of the band's power and an offset of its dB: both are "
        "gone, where neither eps nor the floor of the dB is in the way. Of the sound itself, windows and filters "
        "at an edge hear both sides. Where bands of the norm lie across those of the equalizer, a set has two "
        "gains, and they remain. Change in units of the features' deviation: mean and largest of five.",
        columns=("frequencies", "feature", "norm", "put on the spectrogram", "on the sound", "the same, off the edges"),
        rows=rows,
        verdict=(HOLDS if heard and quiet else IN_PART) if removed and breaks else FAILS,
        because=f"Put on the spectrogram, gains are gone if the bands are the equalizer's, and {other:.0%} and more "
        f"remain if they are not. Of an equalizer of the sound, {log[1]:.0%} remain in dB and {log[2]:.0%} away "
        f"from the edges, of which one norm for all leaves {found['mels', 'dB', 'one for all'][1]:.0%}; in power "
        f"{power[1]:.0%}, as one loud filter beside an edge makes most of its band's variance. And power has no "
        "unit that eps = 1e-5 would know: of a recording 60 dB lower, its variance is below eps, and the norm "
        "removes nothing.",
    )
)
