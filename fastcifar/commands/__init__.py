"""The commands: a dataclass for each, whose fields are its arguments. Help is immediate, since none imports torch."""

from fastcifar.commands.looking import Completion, Count, Doctor, Preview
from fastcifar.commands.trained import Ensemble, Eval, Export, Landscape, Predict
from fastcifar.commands.training import Plan, Profile, Recipes, Reproduce, Resume, Train

__all__ = ["COMMANDS", "Ensemble", "Reproduce", "Resume"]

COMMANDS: dict[str, type] = {
    "train": Train,
    "plan": Plan,
    "eval": Eval,
    "predict": Predict,
    "ensemble": Ensemble,
    "export": Export,
    "landscape": Landscape,
    "count": Count,
    "preview": Preview,
    "doctor": Doctor,
    "profile": Profile,
    "recipes": Recipes,
    "reproduce": Reproduce,
    "completion": Completion,
}
"""The commands by name. Calling one returns the exit status where it may be other than 0."""
