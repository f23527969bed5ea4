"""Several verbs as one recipe: `recipe` reads its stages, `stages` says what each does, `run` goes through them."""
