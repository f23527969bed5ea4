"""Several verbs in a row as one recipe, each stage done once: `stages` are what can stand in it, `run` goes through."""
