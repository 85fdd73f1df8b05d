"""What the tests of answers that are decoded together ask, and how records are compared."""

from seats_cli.batch.records import Asking, Record

ASKING = Asking({"model": "tiny"}, {"max_new_tokens": 6, "ratio": 0.3, "temperature": 0.7})


def by_key(records: list[Record]) -> list[Record]:
    return sorted(({**record, "timing": None} for record in records), key=lambda record: record["key"])
