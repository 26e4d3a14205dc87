"""What a conversion did with every name in a file; readable by people (`text`) and by programs (`to_json`)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field


@dataclass
class Report:
    """source: the path given. format: "ckpt", "ckpt-legacy", "safetensors" or "diffusers". model: the family found.

    parts: "text", "vae", "unet" -> where it came from. used: names of tensors that became parameters. ignored: name
    -> why it is not needed. missing, unexpected, mismatched: what stopped the conversion. notes: what to know.
    """

    source: str
    format: str
    model: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every parameter was found and every name of the file was understood."""
        return not (self.missing or self.unexpected or self.mismatched)

    def lacks(self, part: str) -> bool:
        """Whether tensors of this part are missing."""
        return any(name.startswith(f"{part} ") for name in self.missing)

    def problem(self) -> str:
        """One line on what is wrong, the first names of each kind; empty if nothing is."""
        kinds = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of the wrong shape or kind", self.mismatched),
        )
        found = []
        for kind, names in kinds:
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                found.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {kind}: {', '.join(names[:3])}{more}")
        return "; ".join(found)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    def text(self) -> str:
        """A few lines with counts, then every name that was not used."""
        lines = [f"{self.source}: {self.format}, {self.model or 'unknown model'}"]
        lines += [f"  {part:5} from {where}" for part, where in self.parts.items()]
        lines.append(
            f"  {len(self.used)} tensors used, {len(self.ignored)} ignored, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.mismatched)} of the wrong shape or kind"
        )
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  ignored: {name} ({why})" for name, why in self.ignored.items()]
        for kind in ("missing", "unexpected", "mismatched"):
            lines += [f"  {kind}: {name}" for name in getattr(self, kind)]
        return "\n".join(lines) + "\n"
