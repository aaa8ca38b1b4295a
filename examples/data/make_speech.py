"""Makes speech.wav, the recording of the tour: a synthetic voice, so that nobody's is kept.

Needs espeak-ng (Debian: `apt-get install espeak-ng`; made with 1.51). Run it from anywhere: `python make_speech.py`.
"""

import subprocess
import tempfile
import wave
from pathlib import Path

import torch
import torchaudio

SENTENCE = "Every band of this recording has a mean and a variance of its own."
RATE = 16_000


def spoken(sentence):
    """The sentence as samples from -1 to 1, and their rate."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["espeak-ng", "-v", "en-gb", "-s", "180", "-w", file.name, sentence], check=True)
        with wave.open(file.name) as recording:
            samples = torch.frombuffer(bytearray(recording.readframes(recording.getnframes())), dtype=torch.int16)
            return samples / 32768, recording.getframerate()


samples, rate = spoken(SENTENCE)
samples = torchaudio.functional.resample(samples, rate, RATE)
with wave.open(str(Path(__file__).with_name("speech.wav")), "wb") as recording:
    recording.setnchannels(1)
    recording.setsampwidth(2)
    recording.setframerate(RATE)
    recording.writeframes((samples.clamp(-1, 1) * 32767).round().short().numpy().tobytes())
