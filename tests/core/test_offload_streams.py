"""The order of offloaded state's copies on a GPU's streams, seen on streams that only keep account of who waited for whom.

An action of a stream comes after all that the stream did, and after all that it waited for. Memory belongs to the main stream:
whoever uses it must come after what the main stream did until the memory was taken, and the main stream must have waited for
every use, or the host, when it is given back.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from core.kit import gradients, parameters, run

import hbcore
from hbcore.engine import offload

SHAPES = ((10, 8),) * 12


class Stream:
    """A stream; ``seen`` is how far each stream had come that this one has waited for, itself included."""

    def __init__(self, *_):
        self.seen = {self: 0}

    def act(self):
        self.seen[self] += 1
        return dict(self.seen)

    def wait_event(self, seen):
        for stream, count in seen.items():
            self.seen[stream] = max(self.seen.get(stream, 0), count)

    def wait_stream(self, other):
        self.wait_event(other.seen)

    def record_event(self):
        return dict(self.seen)

    def synchronize(self):
        HOST.wait_event(self.seen)


HOST = Stream()


def after(later, earlier):
    """Whether an action, or all that a stream has yet to do, comes after another; the host may have waited for that one."""
    return any(all(seen.get(stream, 0) >= count for stream, count in earlier.items()) for seen in (later, HOST.seen))


@pytest.fixture
def account(monkeypatch):
    """Follows every use of every twin's memory; returns the main stream and the most bytes that were taken."""
    HOST.seen.clear()
    main, uses, taken, written, most = Stream(), {}, {}, {}, [0]
    twins, owner = {}, {}
    begun, travel = offload.Lane.__init__, offload.Lane._travel
    take, give, go = offload.Twin.open, offload.Twin.close, offload.Journeys.run

    def lane(self, device):
        begun(self, device)
        self._cuda, self._streams = True, [Stream(), Stream()]

    def opening(twin):
        take(twin)
        main.act()  # others of the device's memory, which is this twin's now
        taken[twin], uses[twin], owner[id(twin.tensor)] = dict(main.seen), [], twin
        most[0] = max(most[0], sum(t.size for t in taken))

    def closing(twin):
        if twin in taken:
            for use in uses[twin]:
                assert after(main.seen, use), "memory is given back while somebody uses it"
            del taken[twin]
        give(twin)

    def use(twin, seen, kind):
        assert twin in taken and after(seen, taken[twin]), "memory is used before the main stream is done with it"
        uses[twin].append(seen)
        written.setdefault(twin, []).append((kind, seen))

    def travelling(self, way, copies):
        event = travel(self, way, copies)
        for target, source in copies:
            twin = owner[id(target if way == 0 else source)]
            seen = self._streams[way].act()
            before = [s for kind, s in written.get(twin, ()) if kind != ("fetch", "store")[way]]
            assert all(after(seen, s) for s in before), "a copy runs beside what it copies"
            use(twin, seen, ("fetch", "store")[way])
        return self._streams[way].record_event() if copies else event

    def running(self, k, operation):
        def watched():
            seen = main.act()
            for needs in self._order[k].values():
                for twin in needs.twins:
                    fetched = [s for _, s in written.get(twin, ())]
                    assert all(after(seen, s) for s in fetched), "an operation runs beside a copy of what it uses"
                    use(twin, seen, "run")
            return operation()

        return go(self, k, watched)

    monkeypatch.setattr(offload, "APPLIES", ("cuda", "cpu"))
    monkeypatch.setattr(offload, "SHARE", 640)
    monkeypatch.setattr(offload, "RESIDENT", 4 * 640)
    monkeypatch.setattr(offload.Lane, "__init__", lane)
    monkeypatch.setattr(offload.Lane, "_travel", travelling)
    monkeypatch.setattr(offload.Twin, "open", opening)
    monkeypatch.setattr(offload.Twin, "close", closing)
    monkeypatch.setattr(offload.Journeys, "run", running)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return main, uses, most, twins


CASES = [("AdamW", {}), ("AdamW", {"gradient_clipping": "global_l2norm_clip"}), ("SFAdamW", {}), ("Muon", {}), ("SOAP", {})]
CASES += [
    ("AdamW", {"update_clipping": "global_l2norm_clip"}),
    ("AdamW", {"caution": True, "update_clipping": "l2_clip_"}),
    ("PSGDKron", {}),
    ("AdamW", {"ecc": "bf16+8"}),
]


@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_no_use_of_memory_races_with_another(account, name, options, count):
    _, uses, most, _ = account
    shapes = SHAPES[:count]
    params, expected = parameters(shapes), parameters(shapes)
    optimizer = hbcore.get(name)(params, lr=0.01, offload="cpu", compile="eager", **options)
    run(optimizer, params, gradients(3, shapes))
    assert len(uses) >= 3 and all(uses.values())
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(offload, "APPLIES", ())
        run(hbcore.get(name)(expected, lr=0.01, compile="eager", **options), expected, gradients(3, shapes))
    assert all(map(torch.equal, params, expected))
    if name == "AdamW" and not options:
        assert most[0] <= offload.RESIDENT


def test_a_step_that_fails_gives_no_memory_back_that_is_in_use(account, monkeypatch):
    params = parameters(SHAPES)
    optimizer = hbcore.get("AdamW")(params, lr=0.01, offload="cpu", compile="eager")
    run(optimizer, params, gradients(1, SHAPES))
    layout = optimizer.core.plan.layout
    monkeypatch.setattr(layout.batches[5].segment.executable, "run", lambda *_: 1 / 0)
    layout.operations = offload.Operations()
    with pytest.raises(ZeroDivisionError):
        run(optimizer, params, gradients(1, SHAPES))


def test_both_ways_are_busy_at_once(account):
    """A fetch waits for no store of the last shares, so that it runs beside them."""
    params = parameters(SHAPES)
    optimizer = hbcore.get("AdamW")(params, lr=0.01, offload="cpu", compile="eager")
    run(optimizer, params, gradients(1, SHAPES))
    journeys = optimizer.core.plan.layout.operations.journeys
    [lane] = journeys._lanes.values()
    fetching, storing = lane._streams
    count = len(journeys._order)
    assert count >= 12 and fetching.seen[fetching] == storing.seen[storing] == 2 * 12
    assert storing.seen[fetching] == 2 * 12, "the last store comes after the last fetch"
    assert 0 < fetching.seen[storing] <= 2 * (count - 3), "fetches wait for memory alone, which older stores have"
