"""Property tests of this room: no time limit an example (machines differ), few enough to stay quick."""

from hypothesis import settings

settings.register_profile("selection", deadline=None, max_examples=60)
settings.load_profile("selection")
