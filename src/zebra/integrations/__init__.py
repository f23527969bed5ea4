"""Our attention inside the tools of others: their commands (`command`, `autoload`), and axolotl (`axolotl`)."""
