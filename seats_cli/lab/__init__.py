"""The accuracy lab: what a model is asked, how answers are scored, and what compression leaves of them."""
