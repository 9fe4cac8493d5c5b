"""A study of which every node runs in this process, training on a rank of the pool."""

from pathlib import Path

import yaml
from rank_pool import run_ranks

from mimscale.cli import main
from mimscale.study.config import StudyConfig, load_study
from mimscale.study.graph import Graph, expand
from mimscale.study.nodes import data_problems, leaks
from mimscale.study.view import NodeState, StudyView, study_view, write_study_report


def run_every_node(folder: Path, recipe: Path, *, checked: str) -> tuple[StudyConfig, Graph, StudyView]:
    """Run a study in `folder`, parents first, and write its report.

    Args:
        folder: files of the test.
        recipe: of the study.
        checked: the name of the data that must be what the recipe expects.
    """
    config = load_study([str(recipe), f"run_dir={folder / 'study'}"])
    graph = expand(config)
    for node in graph.nodes.values():
        file = folder / f"{node.id}.yaml"
        file.write_text(yaml.safe_dump(graph.config_of(config.run_dir, node), sort_keys=False))
        if node.verb in ("pretrain", "finetune"):
            assert leaks(config, graph, config.run_dir, node) == ""
            (ended,) = run_ranks([node.verb, str(file)], size=1)
            assert ended.code == 0, ended.err
        else:
            assert main([node.verb, str(file)]) == 0
    assert data_problems(config, graph, config.run_dir, graph.data[checked]) == []
    view = study_view(config, graph, config.run_dir, {node: NodeState("done", "") for node in graph.nodes})
    write_study_report(view, config.run_dir)
    return config, graph, view
