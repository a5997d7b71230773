"""A score's identity is that of one flat class for all methods: scores that were stored under it are found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pgolf_post.derived import derived_id
from pgolf_post.errors import SettingsError
from pgolf_post.score.plain import PlainProtocol
from pgolf_post.score.protocols import PROTOCOLS, Protocol, make_protocol
from pgolf_post.score.sliding import SlidingProtocol
from pgolf_post.score.ttt.methods import PRESETS, TTT_METHODS, ttt_protocol
from pgolf_post.score.ttt.settings import LATER, STORED, TTTProtocol
from pgolf_post.settings import canonical_json

SGD_SET = ["chunk_tokens=128", "stride=16", "last_blocks=2", "freeze=['tok_emb']", "optimizer=muon"]
PHASED_SET = ["chunk_tokens=16", "phases=[4,8]", "adapt=['q','head']", "rank=4", "lanes=2"]

RECORDED: list[tuple[Protocol, str]] = [  # made by the flat class
    (ttt_protocol("sgd-1493", [], {}, 512), "70081b6f047b1a8a12e604b7645d9081cad48e86febb3dd19ae6185bd7198d4e"),
    (ttt_protocol("record-1855", [], {}, 512), "1ed23a96cc46f40520f3d6846746646e1a3fea82225f18daad227fa5964a7092"),
    (ttt_protocol("sgd", [], {}, 512), "141bcb7eb3dd0405d30bf79270468f19e120f171ac9af9ace85cdaf6cf5f773a"),
    (ttt_protocol("scales", [], {}, 512), "0842f2ea1c83b3066b236e4fa719b914d1b6937927ef82af8e3f547d64518a94"),
    (ttt_protocol("lora", [], {}, 512), "b56f8f136308873a867caf1b709514df2de9f98e00f4ebae8357f5268375f47f"),
    (ttt_protocol("phased", [], {}, 512), "afc823483aaa5a95970bd20ed129f036c0d4e17754a3810538f58583272485bb"),
    (
        ttt_protocol("sgd", SGD_SET, {"tail": "score", "max_tokens": 600, "stride": None}, 64),
        "636cc7a565b1f0328a9e1b45de696afa3385dd667fe67fe38c1cbb5ea756beb2",
    ),
    (
        ttt_protocol("phased", PHASED_SET, {"split": "train"}, 32),
        "b725031bf2f2a4e08a2001b384f15a04c5c19db0c749f967e32fa56c50fcd76d",
    ),
    (
        ttt_protocol("sgd", ["method=scales"], {}, 64),
        "3f2cf22f0300103e026f3b9d216479fc8a014c1e353cb42dc58cb4b90ec311c9",
    ),
    (PlainProtocol(seq_len=512), "60e6e3fc2a02b7fb112ff549c9a5942d1970c35b99f9b9908a49bf794c60f04a"),
    (
        SlidingProtocol(seq_len=512, stride=32),
        "d3840808c15af3ec46264b45969f36c2fca49bec90eb68fe8c1033a5f016ec16",
    ),
]
PHASED_JSON = (
    '{"protocol":"ttt","method":"phased","split":"train","seq_len":32,"max_tokens":null,"tail":"drop","seed":0,'
    '"chunk_tokens":16,"optimizer":"adamw","learning_rate":0.0001,"beta1":0.0,"beta2":0.99,"eps":1e-10,'
    '"weight_decay":0.5,"stride":64,"schedule":"cosine","grad_clip":1.0,"epochs":3,"train_batch_seqs":32,'
    '"last_blocks":null,"freeze":[],"rank":4,"alpha":144.0,"adapt":["q","head"],"batch_documents":64,"lanes":2,'
    '"phases":[4,8],"global_lr":0.001,"global_momentum":0.9,"global_chunk_tokens":32768,"global_seq_len":2048,'
    '"global_grad_clip":1.0}'
)


@pytest.mark.parametrize(("protocol", "recorded"), RECORDED)
def test_ids_are_those_recorded(protocol: Protocol, recorded: str) -> None:
    identity = {**protocol.model_dump(mode="json"), "data_manifest_sha256": "data"}
    assert derived_id("score", 2, ["view"], identity) == recorded


def test_the_dump_is_byte_for_byte_the_flat_classes() -> None:
    protocol = ttt_protocol("phased", PHASED_SET, {"split": "train"}, 32)
    assert protocol.model_dump_json() == PHASED_JSON
    assert canonical_json(protocol.model_dump(mode="json")) == canonical_json(json.loads(PHASED_JSON))


@pytest.mark.parametrize("name", TTT_METHODS)
def test_a_row_names_its_class_and_every_key_of_it_is_in_the_identity(name: str) -> None:
    settings, make_pass = TTT_METHODS[name].load()
    assert settings.model_fields["method"].default == name
    assert callable(make_pass)
    own = set(settings.model_fields) - set(TTTProtocol.model_fields)
    assert own <= {*STORED, *LATER}
    assert set(STORED) == set(ttt_protocol(name, [], {}, 512).model_dump()) - set(TTTProtocol.model_fields)
    for key in own:  # as the flat class had it, so that an unset setting is the same number in both
        assert json.loads(json.dumps(settings.model_fields[key].default)) == {**STORED, **LATER}[key]


def test_a_method_of_ones_own_adds_its_keys_behind_the_stored_ones() -> None:
    class OwnProtocol(TTTProtocol):
        method: str = "own"
        rank: int = 3
        warmth: float = 0.5

    dumped: dict[str, Any] = OwnProtocol(seq_len=8).model_dump(mode="json")
    assert dumped["rank"] == 3
    assert list(dumped)[-1] == "warmth"
    assert {key: dumped[key] for key in STORED if key != "rank"} == {k: v for k, v in STORED.items() if k != "rank"}


def test_protocols_are_one_table() -> None:
    from pgolf_post.cli.scoring import PROTOCOL_NAMES

    assert tuple(PROTOCOLS) == PROTOCOL_NAMES
    assert make_protocol("plain", {"seq_len": None}, 16, "x") == PlainProtocol(seq_len=16)
    assert make_protocol("sliding", {"seq_len": 8, "stride": 4}, 16, "x") == SlidingProtocol(seq_len=8, stride=4)
    assert make_protocol("ttt", {}, 16, "x", "sgd", ["stride=4"]) == ttt_protocol("sgd", ["stride=4"], {}, 16)
    with pytest.raises(SettingsError, match="no protocol 'slide'; there are: plain, sliding, ttt"):
        make_protocol("slide", {}, 16, "x")
    with pytest.raises(SettingsError, match="unknown key 'stride'; valid keys here: max_tokens"):
        make_protocol("plain", {"stride": 4}, 16, "x")


def test_every_method_has_a_preset_of_its_name() -> None:
    assert set(TTT_METHODS) <= set(PRESETS)
    assert {str(PRESETS[name]["method"]) for name in TTT_METHODS} == set(TTT_METHODS)
