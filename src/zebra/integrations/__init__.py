"""zebra's attention in other tools: in any command (`command`, `autoload`), and in axolotl (`axolotl`)."""
