"""Makes the word bank with espeak-ng and flite: `python -m seats_cli.demo.voices build`.

Needed only to change words or voices; the made bank is shipped. Each word is trimmed, brought to 16 kHz mono
and one loudness, and spoken faster until it fits `MAX_WORD_S`.
"""

import io
import json
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import soundfile

from seats_cli.demo.nouns import MAX_WORD_S, SAMPLE_RATE, WORDS
from seats_cli.demo.voices import AUDIO, GAP, INDEX
from seats_cli.errors import MediaError

WORD_RMS = 0.07  # of each word, before a clip's gain of -10 to +4 dB
WORD_PEAK = 0.60
OPUS_LEVEL = 0.985  # libsndfile: bits a second = 256000 - 250000 * level
Wave = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Recipe:
    """How one voice is made: an espeak-ng voice (accent+variant), or a flite voice."""

    split: str
    engine: str
    voice: str
    speed: int = 195  # words a minute (espeak-ng -s)
    pitch: int = 50  # espeak-ng -p, 0 to 99

    @property
    def name(self) -> str:
        if self.engine == "flite":
            return f"flite:{self.voice}"
        return f"{self.voice}@{self.speed}p{self.pitch}"


def _espeak(split: str, *rows: tuple[str, int, int]) -> tuple[Recipe, ...]:
    return tuple(Recipe(split, "espeak-ng", voice, speed, pitch) for voice, speed, pitch in rows)


RECIPES = (
    *_espeak(
        "train",
        *(("en-us", 190, 50), ("en-gb", 160, 40), ("en-gb-scotland", 195, 55), ("en-gb-x-rp", 165, 60)),
        *(
            ("en-gb-x-gbclan", 200, 45),
            ("en-gb-x-gbcwmd", 165, 65),
            ("en-029", 195, 50),
            ("en-us-nyc", 170, 35),
        ),
        *(("en-us+f1", 195, 50), ("en-gb+f3", 165, 60), ("en-029+f5", 200, 45), ("en-us+f4", 175, 70)),
        *(
            ("en-us+m1", 190, 40),
            ("en-gb-x-rp+m3", 160, 30),
            ("en-us-nyc+m5", 205, 55),
            ("en-us+m7", 155, 25),
        ),
        *(
            ("en-gb+m8", 210, 60),
            ("en-us+klatt", 155, 50),
            ("en-gb+klatt2", 205, 40),
            ("en-us+klatt4", 160, 60),
        ),
        *(
            ("en-us+Andrea", 200, 50),
            ("en-gb+Annie", 155, 50),
            ("en-us+anika", 205, 45),
            ("en-us+belinda", 160, 50),
        ),
        *(
            ("en-us-nyc+linda", 195, 55),
            ("en-us+steph", 165, 50),
            ("en-us+aunty", 215, 50),
            ("en-gb+grandpa", 175, 45),
        ),
        *(
            ("en-us+Michael", 195, 50),
            ("en-us+david", 165, 50),
            ("en-gb+edward", 200, 50),
            ("en-us+quincy", 165, 55),
        ),
        *(
            ("en-us+travis", 200, 45),
            ("en-gb-scotland+rob", 165, 50),
            ("en-us+whisper", 195, 50),
            ("en-us+victor", 165, 50),
        ),
    ),
    *_espeak("dev", ("en-us+Alex", 200, 50), ("en-gb-scotland+f2", 200, 55)),
    *_espeak("test", ("en-us+Mike", 200, 50), ("en-gb+Alicia", 200, 50)),
    *(Recipe("ood", "flite", voice) for voice in ("slt", "rms", "awb", "kal16", "kal")),
)


def build_bank(folder: Path) -> int:
    """Synthesise every word in every voice into `folder` (AUDIO and INDEX). Returns the bytes written.

    Raises MediaError when espeak-ng or flite is not installed or fails.
    """
    for program in {recipe.engine for recipe in RECIPES}:
        if shutil.which(program) is None:
            raise MediaError(f"{program} is not installed", hint="apt-get install espeak-ng flite")
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(lambda recipe: [speak(recipe, word) for word in WORDS], RECIPES))
    gap = np.zeros(GAP, np.float32)
    flat = np.concatenate([piece for row in spoken for wave in row for piece in (wave, gap)])
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(
        folder / AUDIO, flat, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL
    )
    rows = [
        {"name": recipe.name, "split": recipe.split, "lengths": [len(wave) for wave in row]}
        for recipe, row in zip(RECIPES, spoken, strict=True)
    ]
    text = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
    head = json.dumps({"sample_rate": SAMPLE_RATE, "gap": GAP, "words": WORDS})[:-1]
    (folder / INDEX).write_text(f'{head},\n"voices": [\n{text}\n]}}\n')
    return (folder / AUDIO).stat().st_size + (folder / INDEX).stat().st_size


def speak(recipe: Recipe, word: str) -> Wave:
    """One word in one voice: (n,) float32 at SAMPLE_RATE, at most MAX_WORD_S, no silence at its ends."""
    longest = int(MAX_WORD_S * SAMPLE_RATE)
    factor = 1.0
    for _ in range(8):
        wave = _finish(*_synthesise(recipe, word, factor))
        if len(wave) <= longest:
            return wave
        factor *= 1.12
    raise MediaError(f"{recipe.name} cannot say {word!r} within {MAX_WORD_S} s")


def _synthesise(recipe: Recipe, word: str, factor: float) -> tuple[Wave, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        if recipe.engine == "flite":
            command = ["flite", "-voice", recipe.voice, "--setf", f"duration_stretch={1 / factor:.3f}"]
            command += ["-t", word, "-o", file.name]
        else:
            command = ["espeak-ng", "-v", recipe.voice, "-s", str(round(recipe.speed * factor))]
            command += ["-p", str(recipe.pitch), "-w", file.name, word]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        data = Path(file.name).read_bytes()
    if done.returncode != 0 or len(data) < 1000:
        raise MediaError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return wave, int(rate)


def _finish(wave: Wave, rate: int) -> Wave:
    """Resample, trim what is 38 dB under the loudest 10 ms, and set the loudness."""
    wave = librosa.resample(wave, orig_sr=rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")
    hop = SAMPLE_RATE // 100
    power = np.array([np.mean(wave[i : i + hop] ** 2) for i in range(0, len(wave), hop)])
    loud = np.flatnonzero(power > power.max() * 10**-3.8)
    wave = wave[max(0, loud[0] - 1) * hop : (loud[-1] + 2) * hop].astype(np.float32)
    fade = np.linspace(0, 1, 48, dtype=np.float32)
    wave[:48] *= fade
    wave[-48:] *= fade[::-1]
    active = np.sqrt(np.mean(wave**2))
    gain = min(WORD_RMS / active, WORD_PEAK / float(np.abs(wave).max()))
    finished: Wave = (wave * gain).astype(np.float32)
    return finished
