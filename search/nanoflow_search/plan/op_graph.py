"""A layer's op graph becomes the problem of stage one, and a plan becomes a schedule that the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from nanoflow_backend.graph.collectives import Forms
from nanoflow_backend.graph.operation import Graph, Kind, Operation, Resource
from nanoflow_backend.schedule.plan import Group, Launch, Schedule
from nanoflow_backend.schedule.presets import synchronise
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, Problem, Task, TaskDependency

# (operations, start, stop) -> their time in us, one after the other on the rows start .. stop - 1, with nothing beside.
Times = Callable[[tuple[str, ...], int, int], float]


def layer_problem(
    graph: Graph,
    ranks: int,
    tokens: int,
    chunk_tokens: int,
    times: Times,
    lanes: Collection[str] = tuple(Resource),
) -> Problem:
    """Return the problem of `graph` (a layer of one rank) on batches of `tokens`, cut at multiples of `chunk_tokens`.

    `lanes` are those that there are: tasks of others are in the compute lane.

    Raises:
        ValueError: the chunks do not fill the batch.
    """
    if tokens % chunk_tokens:
        raise ValueError(f"chunk_tokens: expected a divisor of {tokens}, got {chunk_tokens}")
    chunks = tokens // chunk_tokens
    ranges = [(a, b) for a in range(chunks) for b in range(a + 1, chunks + 1)]
    tasks = tuple(
        Task(
            task_name(graph, run),
            task_lane(graph, run, ranks, lanes),
            {(a, b): times(run, a * chunk_tokens, b * chunk_tokens) for a, b in ranges},
            run,
        )
        for run in operation_runs(graph, ranks)
    )
    return Problem(chunks, tasks, task_dependencies(graph, tasks))


def operation_runs(graph: Graph, ranks: int) -> list[tuple[str, ...]]:
    """Return the runs of operations that make up tasks: what lies between attention, collectives and norms.

    The operations of a run are cut alike and follow each other in one lane. Element-wise work stays in the lane of its
    GEMM, whose output is still in the cache. A collective of a single rank does nothing and stays where its input is.
    """
    found: list[list[str]] = []
    alone = False
    for operation in graph.operations:
        apart = _apart(operation, ranks)
        if not found or apart or alone or operation.kernel.startswith("add_rms_norm"):
            found.append([])
        found[-1].append(operation.name)
        alone = apart
    return [tuple(run) for run in found]


def _apart(operation: Operation, ranks: int) -> bool:
    """Return whether an operation is a task of its own, in the lane of its resource."""
    return operation.kernel == "attention" or (operation.resource is Resource.NETWORK and ranks > 1)


def task_lane(graph: Graph, run: tuple[str, ...], ranks: int, lanes: Collection[str] = tuple(Resource)) -> str:
    """Return the lane of a run: memory for attention, network for a collective of several ranks, else compute."""
    first = graph[run[0]]
    return first.resource.value if _apart(first, ranks) and first.resource in lanes else Resource.COMPUTE.value


def task_name(graph: Graph, run: tuple[str, ...]) -> str:
    """Return the name of a run: that of its first GEMM, or of its first operation."""
    return next((op for op in run if graph[op].resource is Resource.COMPUTE), run[0])


def task_dependencies(graph: Graph, tasks: tuple[Task, ...]) -> tuple[TaskDependency, ...]:
    """Return the dependencies between tasks, less those that follow from others.

    Inside a task operations follow each other anyway.
    """
    writer = {value: task.name for task in tasks for op in task.operations for value in graph[op].outputs}
    found: dict[TaskDependency, None] = {}
    for task in tasks:
        for value in (value for op in task.operations for value in graph[op].inputs):
            source, back = graph.carried.get(value, value), int(value in graph.carried)
            pages = graph.values[value].kind is Kind.PAGES
            if source in writer and (writer[source] != task.name or back):
                found[TaskDependency(writer[source], task.name, back, pages)] = None
    return tuple(d for d in found if not _implied(d, list(found)))


def _implied(dependency: TaskDependency, others: list[TaskDependency]) -> bool:
    """Return whether a chain of other dependencies on the same tokens implies this one."""
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
    timeline: CyclicTimeline,
    chunk_tokens: int,
    sms: Mapping[NanoTask, int | None] | None = None,
    all_reduces: Forms = {},  # noqa: B006  nobody changes it
    groups: tuple[Group, ...] = (),
) -> Schedule:
    """Return the schedule of a plan: its launches in the order of their starts, and the waits that they need.

    `graph` has its all-reduces in the forms of `all_reduces`. `sms` limits the SMs of nano-tasks.
    """
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
        all_reduces=dict(all_reduces),
        groups=groups,
    )
    return synchronise(plan, graph)
