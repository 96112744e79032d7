"""From a layer's op graph to the problem of stage one, and from a plan back to a schedule that the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nanoflow_backend.graph.operation import Graph, Kind, Operation, Resource
from nanoflow_backend.schedule.plan import Group, Launch, Schedule
from nanoflow_backend.schedule.presets import synchronise
from nanoflow_search.plan.problem import Dependency, NanoTask, Problem, Task, Timeline

# The time of some operations, one after the other, on the batch's tokens start .. stop - 1, alone on the device.
Times = Callable[[tuple[str, ...], int, int], float]


def layer_problem(graph: Graph, ranks: int, tokens: int, chunk_tokens: int, times: Times) -> Problem:
    """Plans of `graph` on batches of `tokens`, cut at multiples of `chunk_tokens`.

    Raises:
        ValueError: chunks that do not fill the batch.
    """
    if tokens % chunk_tokens:
        raise ValueError(f"chunk_tokens: expected a divisor of {tokens}, got {chunk_tokens}")
    chunks = tokens // chunk_tokens
    ranges = [(a, b) for a in range(chunks) for b in range(a + 1, chunks + 1)]
    tasks = tuple(
        Task(
            name(graph, run),
            lane(graph, run, ranks),
            {(a, b): times(run, a * chunk_tokens, b * chunk_tokens) for a, b in ranges},
            run,
        )
        for run in runs(graph, ranks)
    )
    return Problem(chunks, tasks, dependencies(graph, tasks))


def runs(graph: Graph, ranks: int) -> list[tuple[str, ...]]:
    """Operations that are cut alike and run back to back: what lies between attention, collectives and norms.

    Element-wise work stays in the lane of its GEMM, whose output is still in the cache. A collective of a single rank
    has nothing to do and stays where its input is.
    """
    found: list[list[str]] = []
    alone = False
    for operation in graph.operations:
        apart = _apart(operation, ranks)
        if not found or apart or alone or operation.kernel == "add_rms_norm":
            found.append([])
        found[-1].append(operation.name)
        alone = apart
    return [tuple(run) for run in found]


def _apart(operation: Operation, ranks: int) -> bool:
    """Is it a task of its own, in a lane of its own?"""
    return operation.kernel == "attention" or (operation.resource is Resource.NETWORK and ranks > 1)


def lane(graph: Graph, run: tuple[str, ...], ranks: int) -> str:
    first = graph[run[0]]
    return first.resource.value if _apart(first, ranks) else Resource.COMPUTE.value


def name(graph: Graph, run: tuple[str, ...]) -> str:
    """Of its first GEMM, or of its first operation."""
    return next((op for op in run if graph[op].resource is Resource.COMPUTE), run[0])


def dependencies(graph: Graph, tasks: tuple[Task, ...]) -> tuple[Dependency, ...]:
    """Those between tasks; inside one, operations follow each other anyway."""
    writer = {value: task.name for task in tasks for op in task.operations for value in graph[op].outputs}
    found: dict[Dependency, None] = {}
    for task in tasks:
        for value in (value for op in task.operations for value in graph[op].inputs):
            source, back = graph.carried.get(value, value), int(value in graph.carried)
            pages = graph.values[value].kind is Kind.PAGES
            if source in writer and (writer[source] != task.name or back):
                found[Dependency(writer[source], task.name, back, pages)] = None
    return tuple(d for d in found if not _implied(d, list(found)))


def _implied(dependency: Dependency, others: list[Dependency]) -> bool:
    """Do others, one after the other on the same tokens, say as much? They need no constraint of their own."""
    if dependency.pages:
        return False
    reached = {(d.reader, d.layers_back, d.pages) for d in others if d.writer == dependency.writer and d != dependency}
    todo = list(reached)
    while todo:
        task, back, _ = todo.pop()
        if (task, back) == (dependency.reader, dependency.layers_back):
            return True
        further = {(d.reader, back + d.layers_back, d.pages) for d in others if d.writer == task} - reached
        todo += [step for step in further if step[1] <= dependency.layers_back]
        reached |= further
    return False


def schedule_of(
    graph: Graph,
    problem: Problem,
    timeline: Timeline,
    chunk_tokens: int,
    sms: Mapping[NanoTask, int | None] | None = None,
    split_all_reduces: tuple[str, ...] = (),
    groups: tuple[Group, ...] = (),
) -> Schedule:
    """The launches of a plan of `graph` (its all-reduces already in the plan's form), and the waits they need."""
    first = {task.name: index for index, task in enumerate(problem.tasks)}
    placed = sorted(timeline.placed, key=lambda p: (round(p.start_us, 3), first[p.nano.task], p.nano.start))
    launches = tuple(
        Launch(
            operation=operation,
            start=p.nano.start * chunk_tokens,
            stop=p.nano.stop * chunk_tokens,
            lane=problem[p.nano.task].lane,
            layers_ahead=p.layers_ahead,
            sms=(sms or {}).get(p.nano),
        )
        for p in placed
        for operation in problem[p.nano.task].operations
    )
    tokens = problem.chunks * chunk_tokens
    plan = Schedule(
        tokens=tokens,
        launches=launches,
        granularity=chunk_tokens,
        split_all_reduces=tuple(split_all_reduces),
        groups=groups,
    )
    return synchronise(plan, graph)
