"""Types by which a signature says "a component of this kind, by name".

In YAML: `act: polynorm`, `act: {name: polynorm, order: 2}` or, for any other class,
`act: {class_path: torch.nn.ELU, init_args: {alpha: 0.5}}`. In Python also a class or any callable. The command line
reads the kind from the annotation and checks names and arguments before it builds anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

ActivationSpec = Annotated[str | dict[str, Any] | Callable[..., Any], "activation"]
NormSpec = Annotated[str | dict[str, Any] | Callable[..., Any], "norm"]
LossSpec = Annotated[str | dict[str, Any] | Callable[..., Any], "loss"]
RendererSpec = Annotated[str | dict[str, Any] | Callable[..., Any], "renderer"]
