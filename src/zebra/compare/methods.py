"""The methods that are compared: named options for loading. This module does not import torch.

unchanged                      the checkpoint, beyond its trained length if the texts are longer
linear, dynamic, yarn          RoPE scaled to the length, without training
self-extend                    far tokens share positions
stripes                        the given layout, without training
selected                       as many global layers as `stripes`, selected by measurement
stripes+self-extend, selected+self-extend
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from zebra.data.documents import Names, names_of
from zebra.errors import ZebraError
from zebra.model.rope import Rope
from zebra.positions import SelfExtend
from zebra.stripes import Stripes

UNCHANGED = "unchanged"
SELECTED = "selected"
"""In place of a layout: the one that is selected by measurement."""
_OPTIONS = ("checkpoint", "stripes", "rope", "self_extend", "window", "full_decode")


@dataclass(frozen=True)
class Method:
    """One way to load a model for reading a text.

    Attributes:
        options: fields of `zebra.model.load_options.LoadOptions` as text; `checkpoint` names another checkpoint.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Parse options for loading: `rope=yarn:4 stripes=GLLL:1024`, `checkpoint=runs/adapted/model`.

        Raises:
            ZebraError: another form, an option that is unknown or repeated, or an invalid value.
        """
        pairs = [part.partition("=") for part in text.split()]
        options = {name: value for name, _, value in pairs}
        if not pairs or not all(name in _OPTIONS and value for name, _, value in pairs) or len(options) < len(pairs):
            raise ZebraError(
                f"a method must be OPTION=VALUE pairs, separated by spaces, each of {', '.join(_OPTIONS)} once; got "
                f'{text!r}. Use for example "rope=yarn:4 stripes=GLLL:1024".'
            )
        if "stripes" in options and options["stripes"] != SELECTED:
            Stripes.parse(options["stripes"])
        if "rope" in options:
            Rope.parse(options["rope"])
        if not options.get("self_extend", "auto:").startswith("auto:"):
            SelfExtend.parse(options["self_extend"])
        if not re.fullmatch(r"0*[1-9][0-9]*", options.get("window", "1")):
            raise ZebraError(f"window must be an integer of at least 1; got {text!r}. Fix it.")
        if options.get("full_decode", "true") != "true":
            raise ZebraError(f"full_decode must be true; got {text!r}. Fix it, or leave it out.")
        return cls(text, options)

    @property
    def needs_selection(self) -> bool:
        """Whether its layout must be selected by measurement first."""
        return self.options.get("stripes") == SELECTED

    def arguments(self, selected: Stripes | None) -> dict[str, object]:
        """The fields of `LoadOptions`, without `checkpoint`; `selected` is the selected layout."""
        arguments: dict[str, object] = {name: value for name, value in self.options.items() if name != "checkpoint"}
        if self.needs_selection:
            arguments["stripes"] = selected
        if "window" in arguments:
            arguments["window"] = int(self.options["window"])
        if "full_decode" in arguments:
            arguments["full_decode"] = True
        return arguments


def standard_methods(trained: int | None, length: int, stripes: str) -> dict[str, Method]:
    """The methods of the table above, by name; those that extend the context only if `length` exceeds `trained`."""
    extending = {"self_extend": f"auto:{length}"}
    options: dict[str, dict[str, str]] = {UNCHANGED: {}}
    beyond = trained is not None and length > trained
    if trained is not None and beyond:
        factor = -(-length // trained)
        options |= {name: {"rope": f"{name}:{factor}"} for name in ("linear", "yarn")}
        options |= {"dynamic": {"rope": "dynamic:1"}, "self-extend": extending}
    for name, layout in (("stripes", stripes), (SELECTED, SELECTED)):
        options[name] = {"stripes": layout}
        if beyond:
            options[f"{name}+self-extend"] = {"stripes": layout} | extending
    return {name: Method(name, chosen) for name, chosen in options.items()}


def choose_methods(methods: Mapping[str, Method], names: Names | None) -> list[Method]:
    """The checkpoint as it is, and the methods of these names; None takes all.

    Raises:
        ZebraError: no such method at this length.
    """
    names = None if names is None else names_of(names)
    unknown = [name for name in names or () if name not in methods]
    if unknown:
        raise ZebraError(
            f"the methods at this length are {', '.join(methods)}; got {', '.join(unknown)}. Choose among them."
        )
    return [methods[name] for name in dict.fromkeys([UNCHANGED, *(methods if names is None else names)])]
