"""Many files, many questions: what was named becomes records, in order; what is done is not done again."""
