"""A recording through an equalizer: the gains of its bands are gone after a norm of these bands.

Saves a picture, spectrograms.png, in the folder that is the first argument, or in a temporary one.
"""

# %%
import sys
import tempfile
import wave
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torchaudio
from torch import nn

from flexnorm.spectrograms import CepstralNorm, MelBandNorm, hz_bands

SPEECH = Path(__file__).parent / "data" / "speech.wav"
EDGES = [400.0, 900.0, 1600.0, 2800.0]  # Hz: five bands
GAINS = torch.tensor([-12.0, 6.0, 0.0, -6.0, 12.0])  # dB, of every band

# %% A recording, with the noise of a microphone
with wave.open(str(SPEECH)) as recording:
    rate = recording.getframerate()
    samples = torch.frombuffer(bytearray(recording.readframes(recording.getnframes())), dtype=torch.int16) / 32768
torch.manual_seed(0)
samples = samples + 1e-3 * torch.randn_like(samples)


# %% The equalizer multiplies the bands of the sound itself
def equalized(samples):
    hz = torch.fft.rfftfreq(len(samples), 1 / rate)
    gain = GAINS[torch.bucketize(hz, torch.tensor(EDGES))]
    return torch.fft.irfft(torch.fft.rfft(samples) * 10 ** (gain / 20), n=len(samples))


# %% Each norm sits behind torchaudio's own layers
def features(norm):
    mel = torchaudio.transforms.MelSpectrogram(rate, n_fft=1024, hop_length=160, n_mels=80)
    return nn.Sequential(mel, torchaudio.transforms.AmplitudeToDB(), norm)


bands = hz_bands(EDGES, sample_rate=rate, n_mels=80)
norms = {
    "one norm of all mels": MelBandNorm([80]),
    "MelBandNorm": MelBandNorm(bands),
    "CepstralNorm": CepstralNorm("utterance"),
}
before, after = samples[None], equalized(samples)[None]

# the filters of mels beside an edge hear both sides of it
inner = torch.ones(80, dtype=torch.bool)
for end in (bands.counts.cumsum(0)[:-1]).tolist():
    inner[end - 2 : end + 2] = False

print(f"An equalizer of {', '.join(f'{gain:+.0f}' for gain in GAINS)} dB, below, between and above {EDGES} Hz\n")
print("mean change of the features (their deviation is 1)     all   inside of the bands")
with torch.no_grad():
    for name, norm in norms.items():
        model = features(norm)
        change = (model(after) - model(before)).abs()[0]
        print(f"  {name:<45}{change.mean():>9.3f}{change[inner].mean():>10.3f}")

    # the gains on the spectrogram itself, where nothing reaches over an edge
    decibels = features(nn.Identity())(before)
    shifted = decibels + GAINS[bands.ids, None]
    exact = (norms["MelBandNorm"](shifted) - norms["MelBandNorm"](decibels)).abs().max()
print(f"\nGains on the spectrogram itself change the features of MelBandNorm by {exact:.1e} at most.")

# %% A picture
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
rows = {"decibels": nn.Identity(), **{name: norms[name] for name in ("one norm of all mels", "MelBandNorm")}}
figure, axes = plt.subplots(len(rows), 2, figsize=(10, 7), sharex=True, sharey=True, layout="constrained")
with torch.no_grad():
    for row, (name, norm) in zip(axes, rows.items(), strict=True):
        pair = [features(norm)(x)[0] for x in (before, after)]
        for axis, image, title in zip(row, pair, ("recording", "through an equalizer"), strict=True):
            axis.imshow(image.numpy(), origin="lower", aspect="auto", vmin=pair[0].min(), vmax=pair[0].max())
            axis.set_title(f"{title}, {name}")
axes[-1][0].set(xlabel="frame of 10 ms", ylabel="mel")
figure.savefig(folder / "spectrograms.png", dpi=80)
print(f"Saved {folder / 'spectrograms.png'}")
