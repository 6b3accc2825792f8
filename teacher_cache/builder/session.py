"""What the steps of a command share: the recipe, the place of its cache, and, each made when it is first asked for, the plan that
stands, its tokenizer, and the calibrated teacher.

Policy: a session is frozen. What changes the plan gives a session of its own.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from transformers import PreTrainedTokenizerFast

from signal_store.cache import Cache, open_cache
from signal_store.io.objects import Objects, objects_at
from signal_store.ledger.documents import CALIBRATION, MANIFEST, read_document
from signal_store.manifest import Manifest, parse_manifest
from teacher_cache.builder.calibrate import Calibrated, calibrate_planned
from teacher_cache.builder.plan import Plan, read_plan
from teacher_cache.builder.planning import ensure_plan, settled
from teacher_cache.builder.recipe_parts import calibrated_part, completed_calibration, refuse_another_recipe
from teacher_cache.builder.tokenizer import load_plan_tokenizer
from teacher_cache.recipe import CacheRecipe
from teacher_cache.teacher.dtype import with_dtype
from teacher_cache.teacher.load import device_of, placed
from teacher_cache.worker import ALONE, Worker


@dataclass(frozen=True)
class BuildSession:
    """`recipe`: settled, an overlay's with what it takes from its base. `objects`: the place of its cache. `known_plan` and
    `known_calibrated`: what a step before has made."""

    recipe: CacheRecipe
    objects: Objects
    worker: Worker = ALONE
    known_plan: Plan | None = None
    known_calibrated: Calibrated | None = None

    @classmethod
    def of(cls, recipe: CacheRecipe, worker: Worker = ALONE) -> Self:
        """The session of a recipe; nothing of its cache is read yet."""
        return cls(settled(recipe), objects_at(recipe.cache), worker)

    @classmethod
    def ready(cls, recipe: CacheRecipe, worker: Worker = ALONE) -> Self:
        """The session of a recipe that is planned, here or before. What its teacher cannot run with is refused: a device that this
        machine lacks before a text is read, another tokenizer than the plan's before a weight is."""
        session = cls.of(recipe, worker)
        session.refuse_absent_device()
        session = session.planned()
        session.refuse_another_tokenizer()
        return session

    @cached_property
    def plan(self) -> Plan:
        """The plan that stands; NotFoundError if there is none."""
        return self.known_plan or read_plan(self.objects)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The recipe's; MismatchError where it is not the one of the plan."""
        return load_plan_tokenizer(self.recipe.teacher, self.plan.document.body["tokenizer"]["digest"], self.recipe.cache)

    @cached_property
    def calibrated(self) -> Calibrated:
        """The teacher, loaded, with the calibration that stands or that it makes now."""
        return self.known_calibrated or calibrate_planned(self.recipe, self.plan, self.objects, self.worker)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest that stands; the teacher is not loaded for it."""
        return parse_manifest(read_document(self.objects, MANIFEST).body, MANIFEST)

    def planned(self) -> Self:
        """The session whose plan is the recipe's: made now, or compared with the one that stands."""
        return replace(self, known_plan=ensure_plan(self.recipe, self.worker))

    def with_plan(self, plan: Plan) -> Self:
        """The session of another plan: as it was, or as it is made again."""
        return replace(self, known_plan=plan)

    def extended(self) -> Self:
        """The session after its plan was extended; the teacher stays."""
        plan = read_plan(self.objects)
        return replace(self, known_plan=plan, known_calibrated=replace(self.calibrated, plan=plan))

    def refuse_absent_device(self) -> None:
        """InputError where this machine lacks the teacher's device: before a text is read."""
        device_of(placed(self.recipe.teacher, self.worker.local))

    def refuse_another_tokenizer(self) -> None:
        """MismatchError where the recipe's is not the one that the cache was planned with: before the teacher is loaded."""
        _ = self.tokenizer

    def refuse_another_calibration(self) -> None:
        """MismatchError where the cache was calibrated by another recipe; the teacher is not loaded for it."""
        made = completed_calibration(read_document(self.objects, CALIBRATION).body["recipe"])
        wanted, _ = with_dtype(self.recipe, self.objects)
        refuse_another_recipe("calibrated", made, calibrated_part(wanted, self.plan.digest), wanted)

    def open(self) -> Cache:
        """The sealed cache; an overlay together with its base."""
        addresses = [self.recipe.cache] if self.recipe.base is None else [self.recipe.base, self.recipe.cache]
        return open_cache(addresses)
