"""Several commands as one recipe: `recipe` reads its stages, `run` checks and performs them."""
