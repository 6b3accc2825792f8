"""Roles of words: from the plan, without the teacher."""

from signal_store.manifest import Manifest
from signal_store.signals import TagsSignal
from teacher_cache.signals.base import SignalExtractor
from teacher_cache.signals.extracted import Extracted, Rows
from teacher_cache.signals.unit_work import SignalBatch, UnitWork


class TagsExtractor(SignalExtractor[TagsSignal, None]):
    """What the sources' taggers said."""

    def plan_rows(self, work: UnitWork, manifest: Manifest) -> Rows:
        """One row a token."""
        return {"tags/roles": work.plan.roles}

    def extract(self, prepared: None, batch: SignalBatch) -> Extracted:
        """Nothing."""
        return Extracted({})
