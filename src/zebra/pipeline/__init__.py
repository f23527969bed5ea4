"""Several commands as one recipe: `recipe` reads its stages, `run` checks them and goes through them."""
