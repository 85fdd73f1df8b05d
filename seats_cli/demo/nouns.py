"""The nouns of the toy world: everything that can be seen, heard or read in one of its clips.

Tuples, in an order that is part of the data format: packed tensors and labels hold indices into them.
"""

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
COLOUR_RGB = (
    (0.90, 0.10, 0.12),
    (0.98, 0.52, 0.05),
    (0.98, 0.92, 0.12),
    (0.10, 0.68, 0.18),
    (0.10, 0.85, 0.90),
    (0.12, 0.25, 0.95),
    (0.60, 0.15, 0.75),
    (0.97, 0.97, 0.97),
)

MOTIONS = ("left", "right", "up", "down", "still")

# The letters a to d name the options of a question, so no glyph is one of them; no two glyphs look alike.
GLYPHS = (*"efhjklmnprstuvwxyz", *"346789")

# One or two syllables, far apart in sound, and none of them a shape, a colour, a motion or a number.
WORDS = (
    *("apple", "baby", "basket", "beach", "bottle", "bread", "bridge", "butter"),
    *("camel", "candle", "captain", "castle", "chair", "chicken", "church", "cloud"),
    *("coffee", "cookie", "desert", "doctor", "dolphin", "dragon", "engine", "fish"),
    *("forest", "frog", "garden", "giant", "glove", "guitar", "hammer", "horse"),
    *("house", "island", "jacket", "kitchen", "knife", "ladder", "lemon", "milk"),
    *("mirror", "monkey", "mountain", "ocean", "office", "onion", "pencil", "phone"),
    *("pillow", "queen", "rabbit", "river", "rocket", "sister", "smoke", "snake"),
    *("spider", "sugar", "thunder", "tiger", "truck", "village", "window", "winter"),
)

# chirp: a rising tone; whistle: a falling one; clicks: a train of them; whoosh: a burst of noise.
SOUNDS = ("beep", "chirp", "whistle", "buzz", "bell", "clicks", "whoosh", "siren")

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)

SPLITS = ("train", "dev", "test", "ood")
SAMPLE_RATE = 16_000
MAX_WORD_S = 0.75
