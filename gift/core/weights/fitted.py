"""A method that is fitted to a tensor: what it is said to be, in files, states and reports."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gift.core.delta import Delta
from gift.errors import AdaptationError
from gift.layers.layouts import Layout, LayoutOptions
from gift.layers.table import layout_of
from gift.methods import Method


@dataclass
class FittedDelta(Delta):
    """The method of an adapted tensor, and how the tensor is read as a matrix.

    Args:
        method: the method, fitted to the tensor's shape once that is known.
        options: the choice of layouts.
        asked: the method as requested, before it was fitted; None if it is not fitted.
        layout: how the tensor is read as a matrix; None while a lazy tensor has no shape.
    """

    method: Method = field(kw_only=True)
    options: LayoutOptions = field(kw_only=True)
    asked: Method | None = None
    layout: Layout | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The method, the shape of the matrix, and the settings that affect the weight."""
        if self.layout is None:
            return {}
        matrix = list(self.layout.matrix)
        return {"method": self.method.name, "matrix": matrix} | self.method.compat_settings

    @property
    def waits(self) -> bool:
        """Whether the delta means nothing yet: it is a part of a whole of unknown size."""
        return self.layout is None and self.method.is_part

    @property
    def clipped(self) -> bool:
        """Whether the tensor got another size than requested, and the user did not allow that."""
        asked = self.asked
        if asked is None or asked.clips is not None or self.layout is None:
            return False
        return asked.size not in (None, self.method.size)

    def refusal(self) -> str:
        """Why the requested size was clipped."""
        assert self.asked is not None
        assert self.layout is not None
        try:
            self.asked.fit(self.layout.matrix)
        except AdaptationError as error:
            return str(error)
        return ""

    def hidden_settings(self, module: nn.Module, key: str) -> dict[str, Any]:
        """The settings that differ from the method's defaults, and a layout that the user chose."""
        if self.layout is None:
            return {}
        hidden = self.method.hidden_settings
        if not self.method.shows_matrix and self._has_chosen_layout(module, key):
            hidden |= {"matrix": list(self.layout.matrix)}
        return hidden and {"method": self.method.name} | hidden

    def _has_chosen_layout(self, module: nn.Module, key: str) -> bool:
        """Whether the layout differs from the method's own choice."""
        assert self.layout is not None
        own = LayoutOptions().settled(self.method.conv_layouts, self.method.rows_are_outputs)
        if self.options == own:
            return False
        return layout_of(module, key, torch.Size(self.layout.shape), own) != self.layout
