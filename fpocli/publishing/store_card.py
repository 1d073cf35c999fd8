"""The card of a store, as a data set of the hub."""

import shlex
from typing import Any

from huggingface_hub import DatasetCardData

from fpocli.display.cards import on_hub, plain, table, versions
from fpocli.store.reader import Store


def store_card(store: Store, repository: str | None, name: str) -> str:
    """The text of README.md.

    Args:
        store: a complete one.
        repository: where it will be on the hub, or None.
        name: of the store's folder, there as well.
    """
    about = store.meta
    model, data = about["model"], about["data"]
    rows: list[tuple[str, Any]] = [
        ("format", f"{about['format']} {about['version']} (Zarr 3)"),
        ("fingerprint", about["fingerprint"]),
        ("written by", versions(store)),
        ("reference", f"{model['source']}, {model['architecture']}, {model['dtype']}"),
        ("weights", f"sha256 {model['hash']}"),
        ("data", f"{data['source']} {data['split'] or ''}"),
        ("pairs", f"{store.scored:,} of {about['pairs']['read']:,} rows"),
        ("chat template", about["tokenizer"]["chat_template"]["name"]),
    ]
    if store.imported:
        rows.append(("log-probabilities", f"imported from {store.imported['source']}"))
    rows += [
        (site, f"{of['sae']['source']}, the {of['k']:,} largest of {of['d_sae']:,} features")
        for site, of in store.sites.items()
    ]
    if store.distributions:
        rows.append(("next tokens", store.distributions.words))
    sources = [name for name in [on_hub(store, "data")] if name]
    front = DatasetCardData(
        tags=["fpo", "preference-optimization"],
        task_categories=["text-generation"],
        source_datasets=sources or None,
        # Its arrays are no table.
        viewer=False,
    )
    get = [f"    hf download {repository} --repo-type dataset --local-dir ."]
    folder = shlex.quote(name)
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {plain(repository or name)}\n",
            "Preference pairs as token ids, with the log-probabilities and SAE features of a "
            "frozen reference model: a store of fpo (Feature-level Preference Optimization, "
            "arXiv 2411.07618).\n",
            table(rows),
            "\n## Use\n",
            *(get if repository else []),
            f"    fpo inspect {folder}",
            f"    fpo train --cache {folder}\n",
            "It holds the text of the data as token ids, so the licence of the data applies.",
            "",
        ]
    )
