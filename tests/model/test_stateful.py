"""Any verbs in any order, good ones and bad ones: after each the model says what one built afresh would say.

The machine keeps its own books: which sets there are, how each was made, which tensors it holds, which one is active,
whether it is merged. After every call the model is compared with one that is built anew from these books on a copy of
the pristine host. It never asks the model what it believes of itself, but for the books' own check.
"""

import contextlib
import copy
import errno
import gc
import importlib.util
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, HOSTS
from reference import State, afresh, distance, equal, image, plain, said, stirred, value

import adaptkit

# ------------------------------------------------------------------------------------------------------------- hosts

HOST = {
    "timm-vit": lambda: HOSTS["timm-vit"].build(proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.2),
    "timm-beit": HOSTS["timm-beit"].build,  # reads the weight of qkv, beside which its biases lie
    "hf-dinov2": HOSTS["hf-dinov2-reg"].build if "hf-dinov2-reg" in HOSTS else None,  # with DropPath
}
SIDE = {"timm-vit": 32, "timm-beit": 32, "hf-dinov2": 56}


def quantised_bnb(host):
    import bitsandbytes

    def quantised(layer):
        made = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
        )
        made.load_state_dict(layer.state_dict())
        return made

    for path, layer in list(host.named_modules()):
        if isinstance(layer, nn.Linear) and any(map(str.isdigit, path.split("."))):
            parent, _, name = path.rpartition(".")
            setattr(host.get_submodule(parent), name, quantised(layer))
    return host.to("cpu").eval()


def quantised_torchao(host):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        host,
        Int8WeightOnlyConfig(),
        filter_fn=lambda m, path: isinstance(m, nn.Linear) and any(map(str.isdigit, path.split("."))),
    )
    return host


def blocks_of(host):
    return next(m for m in host.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == DEPTH)


def compiled_around(host):
    blocks = blocks_of(host)
    for i, block in enumerate(list(blocks)):
        blocks[i] = torch.compile(block, backend="eager")
    return host


def compiled_in_place(host):
    for block in blocks_of(host):
        block.compile(backend="eager")
    return host


def with_peft(host):
    names = ["fc1", "fc2"]
    return peft.get_peft_model(host, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()


FORMS = {
    "bare": lambda host: host,
    "peft": with_peft,
    "compiled-around": compiled_around,
    "compiled-in-place": compiled_in_place,
    "bnb": quantised_bnb,
    "torchao": quantised_torchao,
}
NEEDS = {"bnb": "bitsandbytes", "torchao": "torchao"}


def build(name, form):
    """A backbone as a user has it: some of it in eval mode, some of it frozen, nothing zero."""
    torch.manual_seed(0)
    host = FORMS[form](HOST[name]())
    with torch.no_grad():
        getattr(host, "forward_features", host)(image(SIDE[name]))  # what a library does at the first call is done
    host.train()
    modules = list(host.modules())
    modules[-1].eval()
    modules[len(modules) // 2].eval()
    floating = [p for n, p in host.named_parameters() if p.is_floating_point() and "lora_" not in n]
    floating[0].requires_grad_(False)
    floating[len(floating) // 2].requires_grad_(False)
    return host


# ----------------------------------------------------------------------------------------------------------- adapters

#: Norms without running statistics: a forward in training mode then changes nothing.
METHODS = {
    "lora": [("lora", {"r": 4, "lora_alpha": 8})],
    "dora": [("lora", {"r": 2, "use_dora": True, "target_modules": ["fc1"]})],
    "lora-bias": [("lora", {"r": 2, "lora_bias": True, "lora_dropout": 0.3, "target_modules": ["fc1", "fc2"]})],
    "loha": [("lora", {"r": 2, "peft_type": "LOHA"})],
    "ia3": [("lora", {"peft_type": "IA3", "target_modules": ["fc1", "fc2"]})],
    "vit-adapter": [("vit-adapter", {"conv_inplane": 8, "norm": "group"})],
    "sfp": ["sfp"],
    "metaformer": [("metaformer", {"width": 8})],
    "adavit": ["adavit"],
    "lora+sfp": ["lora", "sfp"],
}
MERGES = {"lora", "dora", "lora-bias", "loha", "ia3", "lora+sfp"}
INSIDE = MERGES  # those that a PeftModel, which has its own "lora", does not take
HEADS = {
    "none": None,
    "classifier": ("classifier", {"num_classes": 3}),
    "fpn": ("fpn", {"num_classes": 3, "channels": 8, "dropout": 0.3}),
}
NAMES = ("a", "b", "c")
BAD_NAMES = ("", ".", "a.b", "a/b", "keys", "training")


class UsersOwn(Exception):
    """An error of the user's inside ``disable_adapter()``."""


class Book:
    """A set as the machine knows it."""

    def __init__(self, method, head, tensors, on):
        self.method, self.head, self.on = method, head, on  # on: which pristine host it is built on
        self.tensors = {k: v.detach().clone() for k, v in tensors.items()}
        self.training = True

    def saw(self, tensors):
        self.tensors = {k: v.detach().clone() for k, v in tensors.items()}


class Rule(NamedTuple):
    """A verb, when it can be called, and what it is given one of."""

    call: Callable[..., None]
    when: Callable[[Any], Any]
    choices: dict[str, Sequence[Any]]


RULES: list[Rule] = []


def rule(when, **choices):
    """Make a method of the machine one of its verbs."""

    def listed(call):
        RULES.append(Rule(call, when, choices))
        return call

    return listed


class Verbs:
    """The machine, on a host in a form."""

    def __init__(self, host_name, form, folder, seed):
        self.host_name, self.form, self.folder, self.random = host_name, form, folder, random.Random(seed)
        self.count = 0
        self.x = image(SIDE[host_name])
        self.model = None
        self.used = Counter({one.call.__name__: 0 for one in RULES})
        self.seen = set()  # in which states the model was compared
        self.a_host()

    def go(self, steps):
        """Call a verb that was called least among those that can be, so many times."""
        for _ in range(steps):
            possible = [one for one in RULES if one.when(self)]
            least = min(self.used[one.call.__name__] for one in possible)
            chosen = self.random.choice([one for one in possible if self.used[one.call.__name__] == least])
            self.used[chosen.call.__name__] += 1
            chosen.call(self, **{name: self.random.choice(values) for name, values in chosen.choices.items()})
            self.all_is_as_it_must_be()

    @property
    def is_attached(self):
        return self.model is not None

    @property
    def is_active(self):
        return self.model is not None and self.active is not None

    # ------------------------------------------------------------------------------------------------------ the books

    def a_host(self):
        self.backbone = build(self.host_name, self.form)
        layers = [
            m for m in self.backbone.modules() if isinstance(m, BaseTunerLayer)
        ]  # a PeftModel's, and what is in them
        peft_own = {id(m) for layer in layers for n, m in layer.named_modules() if not n.startswith("base_layer")}
        self.own = [m for m in self.backbone.modules() if id(m) not in peft_own]
        # What it is compared with is built on copies without LoRA and compiled regions.
        self.bare = build(self.host_name, self.form if self.form in NEEDS else "bare")
        self.pristine = copy.deepcopy(self.backbone) if self.form == "peft" else self.bare
        self.plain = plain(copy.deepcopy(self.bare).eval(), self.x)
        self.before = State(self.backbone, "lora_")
        self.sets, self.active, self.merged, self.training = {}, None, False, False

    def next_seed(self):
        self.count += 1
        return self.count

    def expected(self, name, double=False):
        """What a model built afresh with this set says."""
        book = self.sets[name]
        model = afresh(
            self.pristine if book.on == "given" else self.bare, METHODS[book.method], HEADS[book.head], book.tensors
        )
        if double:
            return said(model.double(), self.x.double())
        return said(model.train(self.training), self.x)

    def exact(self):
        """Compiled regions may round otherwise; nothing else may."""
        return not self.form.startswith("compiled")

    def check_output(self, name, merged):
        """The model says what the set says alone; None is the plain backbone."""
        found = said(self.model, self.x)
        assert all(t.isfinite().all() for t in found)
        if name is None:
            assert equal(found, self.plain) if self.exact() else distance(found, self.plain) < 1e-5
            return
        alone = self.expected(name)
        if merged:  # a change inside a weight is rounded once more than a change beside it
            double = self.expected(name, double=True)
            assert distance(found, double) <= 16 * (distance(alone, double) + torch.finfo(torch.float32).eps)
        else:
            assert equal(found, alone) if self.exact() else distance(found, alone) < 1e-5

    def holds_a_change(self):
        """Whether the backbone's own weights differ from what they were."""
        now = {n.replace(".base_layer", ""): p for n, p in self.model.backbone.named_parameters()}
        was = {n.replace(".base_layer", ""): v for n, v in self.before.values.items()}
        return any(not torch.equal(value(now[n]), v) for n, v in was.items() if "lora_" not in n and n in now)

    def all_is_as_it_must_be(self):
        if self.model is None:
            return
        model = self.model
        assert model.active_adapter == self.active
        assert sorted(model.sets) == sorted(self.sets)
        assert model.training == self.training
        assert not any(m.training for m in self.own), "the backbone stays in eval mode"
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == (set() if self.active is None else {id(p) for p in model.sets[self.active].parameters()})
        assert not any(
            p.requires_grad or p.grad is not None for n, p in model.backbone.named_parameters() if "lora_" not in n
        )
        assert self.holds_a_change() == self.merged
        if self.active is not None:
            held = model.adapter_state_dict()
            assert held.keys() == self.sets[self.active].tensors.keys()
            assert all(torch.equal(v, self.sets[self.active].tensors[k]) for k, v in held.items())
        self.check_output(self.active, self.merged)
        self.seen.add("plain" if self.active is None else "merged" if self.merged else "beside")

    def untouched(self, *errors, match=None):
        """A call that must fail: nothing that can be seen changes."""
        machine = self

        class Watch:
            def __enter__(self):
                self.said = said(machine.model, machine.x)
                self.modes = [m.training for m in machine.model.modules()]
                self.flags = {n: p.requires_grad for n, p in machine.model.named_parameters()}
                self.raises = pytest.raises(errors, match=match)
                self.raises.__enter__()

            def __exit__(self, *exc):
                handled = self.raises.__exit__(*exc)
                if handled:
                    assert [m.training for m in machine.model.modules()] == self.modes
                    assert {n: p.requires_grad for n, p in machine.model.named_parameters()} == self.flags
                    assert equal(said(machine.model, machine.x), self.said)
                return handled

        return Watch()

    # ------------------------------------------------------------------------------------------------------- attaching

    def methods_that_fit(self, method):
        """On a PeftModel the first set has peft's LoRA already."""
        return not (self.form == "peft" and method in INSIDE)

    @rule(lambda self: not self.is_attached, method=sorted(METHODS), head=sorted(HEADS), name=NAMES)
    def attach(self, method, head, name):
        if not self.methods_that_fit(method):
            method = "sfp"
        try:
            model = adaptkit.attach(self.backbone, *METHODS[method], head=HEADS[head], name=name)
        except (ValueError, TypeError):
            assert self.form in NEEDS, "only a quantised host may refuse one of these"
            assert self.before.changes() == []
            return
        self.model, self.training, self.merged, self.active = model, True, False, name
        # Reset the books: tensors that the PeftModel brought are in the set, and stay there after detach.
        self.sets = {name: Book(method, head, model.adapter_state_dict(), "given")}
        new = stirred(model.adapter_state_dict(), self.next_seed())
        model.load_adapter_state_dict(new)
        self.sets[name].saw(new)

    @rule(lambda self: not self.is_attached, bad=[*BAD_NAMES, "option", "file", "target"])
    def attach_wrongly(self, bad):
        before = State(self.backbone)
        (self.folder / "foreign").mkdir(exist_ok=True)
        (self.folder / "foreign" / "adapter_model.safetensors").write_bytes(b"not at all")
        given = {
            "option": [("vit-adapter", {"nonsense": 1})],
            "file": [self.folder / "foreign"],
            "target": ["sfp", ("metaformer", {"width": -1})],
        }
        with pytest.raises(ValueError):
            adaptkit.attach(self.backbone, *given.get(bad, ["sfp"]), name=bad if bad in BAD_NAMES else "a")
        assert before.changes() == []

    @rule(
        lambda self: self.is_attached and len(self.sets) < 3,
        method=sorted(METHODS),
        head=sorted(HEADS),
        from_file=[False, True],
    )
    def add(self, method, head, from_file):
        self.add_one(method, head, from_file)

    def add_one(self, method, head, from_file):
        name = next(n for n in NAMES if n not in self.sets)
        before = said(self.model, self.x)
        refused = []
        if self.form in NEEDS:  # a quantised host may refuse a method; what it takes it must take here too
            try:
                adaptkit.attach(copy.deepcopy(self.bare), *METHODS[method])
            except (ValueError, TypeError) as error:
                refused.append(type(error))
        if refused:
            with self.untouched(*refused):
                self.model.add_adapter(*METHODS[method], name=name)
            return
        if from_file:
            made = adaptkit.attach(copy.deepcopy(self.bare), *METHODS[method], head=HEADS[head])
            made.load_adapter_state_dict(stirred(made.adapter_state_dict(), self.next_seed()))
            made.save(self.folder / "added")
            self.model.add_adapter(self.folder / "added", name=name)
            tensors = made.adapter_state_dict()
        else:
            self.model.add_adapter(*METHODS[method], head=HEADS[head], name=name)
            tensors = self.model.sets[name].tensors()
        self.sets[name] = Book(method, head, tensors, "bare")
        if self.active is not None:
            assert equal(said(self.model, self.x), before), "another set changes nothing of what the active one says"

    @rule(lambda self: self.is_attached and self.sets)
    def set(self):
        self.set_one(self.random.choice(sorted(self.sets)))

    def set_one(self, name):
        same = name == self.active
        self.model.set_adapter(name)
        self.active = name
        self.merged = self.holds_a_change() if same else False  # setting the active one may leave it merged

    @rule(lambda self: self.is_attached and self.sets)
    def delete(self):
        self.delete_one(self.random.choice(sorted(self.sets)))

    def delete_one(self, name):
        before = said(self.model, self.x)
        self.model.delete_adapter(name)
        del self.sets[name]
        if name != self.active:
            assert equal(said(self.model, self.x), before)
            return
        self.active, self.merged = self.model.active_adapter, False
        assert (self.active is None) == (not self.sets)

    # ------------------------------------------------------------------------------------------------- left out, merged

    @rule(
        lambda self: self.is_attached,
        inner=["nothing", "set", "add", "delete", "hotswap", "load", "eval", "raise", "again"],
    )
    def disable(self, inner):
        training = self.training
        with contextlib.suppress(UsersOwn), self.model.disable_adapter():
            self.check_output(None, False)
            if inner == "set" and self.sets:
                name = self.random.choice(sorted(self.sets))
                self.model.set_adapter(name)
                self.merged = None if name == self.active else False
                self.active = name
            elif inner == "add" and len(self.sets) < 3:
                self.add_disabled(self.random.choice(sorted(METHODS)))
            elif inner == "delete" and self.sets:
                name = self.random.choice(sorted(self.sets))
                self.model.delete_adapter(name)
                del self.sets[name]
                if name == self.active:
                    self.active, self.merged = self.model.active_adapter, False
            elif inner == "hotswap" and self.active:
                self.hotswap()
            elif inner == "load" and self.active:
                self.load_tensors()
            elif inner == "eval":
                self.model.eval()
                self.training = False
            elif inner == "again":
                with self.model.disable_adapter():
                    self.check_output(None, False)
            elif inner == "raise":
                raise UsersOwn
            self.check_output(None, False)
            assert not any(m.training for m in self.own)
        assert training or not self.training
        if self.merged is None:
            self.merged = self.holds_a_change()

    def add_disabled(self, method):
        method = "sfp" if self.form in NEEDS else method
        name = next(n for n in NAMES if n not in self.sets)
        self.model.add_adapter(*METHODS[method], name=name)
        self.sets[name] = Book(method, "none", self.model.sets[name].tensors(), "bare")

    def can_merge(self):
        quantised = self.form in NEEDS
        return self.sets[self.active].method in MERGES and not quantised

    @rule(lambda self: self.is_active and not self.merged)
    def merge(self):
        peft_own = self.form == "peft" and self.sets[self.active].on == "given"
        if self.training:
            with self.untouched(RuntimeError, TypeError, ValueError):
                self.model.merge_adapter()
        elif self.can_merge() or peft_own:
            self.model.merge_adapter()
            self.merged = True
        else:
            with self.untouched(TypeError, ValueError, RuntimeError):
                self.model.merge_adapter()

    @rule(lambda self: self.is_active and not self.merged and not self.training)
    def merge_with_a_nan(self):
        if not self.can_merge():
            return
        good = self.sets[self.active].tensors
        bad = {k: v.clone() for k, v in good.items()}
        last = [k for k in bad if k.startswith("lora.")][-1]
        bad[last].view(-1)[0] = float("nan")
        self.model.load_adapter_state_dict(bad)
        with pytest.raises(ValueError):
            self.model.merge_adapter()
        assert not self.holds_a_change()
        self.model.load_adapter_state_dict(good)

    @rule(lambda self: self.is_active)
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = False

    # ---------------------------------------------------------------------------------------------------- other tensors

    @rule(lambda self: self.is_active)
    def swap(self):
        self.hotswap(self.random.choice(sorted(self.sets)))

    def hotswap(self, name=None):
        name = name or self.active
        book = self.sets[name]
        model = afresh(
            self.pristine if book.on == "given" else self.bare, METHODS[book.method], HEADS[book.head], book.tensors
        )
        model.load_adapter_state_dict(stirred(book.tensors, self.next_seed()))
        model.save(self.folder / "swap")
        self.model.hotswap_adapter(self.folder / "swap", name=name)
        book.saw(model.adapter_state_dict())

    @rule(lambda self: self.is_active)
    def load_adapter_tensors(self):
        self.load_tensors()

    def load_tensors(self):
        book = self.sets[self.active]
        tensors = stirred(book.tensors, self.next_seed())
        self.model.load_adapter_state_dict(tensors)
        book.saw(tensors)

    @rule(lambda self: self.is_attached and self.sets, assign=[False, True])
    def load_state_dict(self, assign):
        whole = {k: v for k, v in self.model.state_dict().items()}
        own = [k for k in whole if k.startswith("sets.")]
        new = {**{k: v.clone() for k, v in whole.items()}, **stirred({k: whole[k] for k in own}, self.next_seed())}
        if self.form in NEEDS:  # a quantised backbone has its own rules of loading
            new = {k: new[k] for k in own}
        if self.merged:
            with self.untouched(RuntimeError):
                self.model.load_state_dict(new, strict=self.form not in NEEDS, assign=assign)
            return
        self.model.load_state_dict(new, strict=self.form not in NEEDS, assign=assign)
        for name, book in self.sets.items():
            tensors = {}
            for key in own:
                if key.startswith(f"sets.{name}."):
                    key_in_file = key.removeprefix(f"sets.{name}.").removeprefix("adapters.")
                    tensors[key_in_file] = new[key]
            assert tensors.keys() == book.tensors.keys()
            book.saw(tensors)

    @rule(lambda self: self.is_active and self.training)
    def step(self):
        """One step of an optimiser: what is active is trained, and nothing else."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        features = self.model(self.x)
        sum(t.square().mean() for t in (features.tokens, *features.maps) if t.requires_grad).backward()
        assert all(p.grad is None for n, p in self.model.backbone.named_parameters() if "lora_" not in n)
        assert any(p.grad is not None for p in trained)
        torch.optim.SGD(trained, lr=1e-2).step()
        for p in trained:
            p.grad = None
        book = self.sets[self.active]
        held = self.model.adapter_state_dict()
        assert any(not torch.equal(v, book.tensors[k]) for k, v in held.items())
        book.saw(held)

    # -------------------------------------------------------------------------------------------------------- modes

    @rule(lambda self: self.is_attached)
    def train(self):
        if self.merged:
            with self.untouched(RuntimeError):
                self.model.train()
        else:
            assert self.model.train() is self.model
            self.training = True

    @rule(lambda self: self.is_attached)
    def eval(self):
        self.model.eval()
        self.training = False

    # ------------------------------------------------------------------------------------------------------- saving

    @rule(lambda self: self.is_attached and self.sets)
    def save(self):
        name = self.random.choice(sorted(self.sets))
        self.model.save(self.folder / "saved", name=name)
        file = adaptkit.load(self.folder / "saved")
        assert file.tensors.keys() == self.sets[name].tensors.keys()
        assert all(torch.equal(v, self.sets[name].tensors[k]) for k, v in file.tensors.items())

    @rule(lambda self: self.is_active, bad=["folder", "full", "replace", "metadata"])
    def save_where_it_cannot_be(self, bad):
        self.model.save(self.folder / "kept")
        before = {p.name: p.read_bytes() for p in (self.folder / "kept").iterdir()}
        (self.folder / "taken").write_text("a file")
        full = OSError(errno.ENOSPC, "No space left on device")
        with self.untouched(OSError, TypeError, ValueError):
            if bad == "folder":
                self.model.save(self.folder / "taken")
            elif bad == "metadata":
                self.model.save(self.folder / "kept", thing=object())
            else:
                with mock.patch.object(os, "fsync" if bad == "full" else "replace", side_effect=full):
                    self.model.save(self.folder / "kept", again="and again")
        assert {p.name: p.read_bytes() for p in (self.folder / "kept").iterdir()} == before

    # ------------------------------------------------------------------------------------------------- what must fail

    @rule(lambda self: self.is_attached, name=[*BAD_NAMES, "existing"], method=["sfp", "lora"])
    def add_under_a_bad_name(self, name, method):
        if name == "existing":
            if not self.sets:
                return
            name = next(iter(self.sets))
        with self.untouched(ValueError):
            self.model.add_adapter(*METHODS[method], name=name)

    @rule(lambda self: self.is_attached, verb=["set", "delete", "swap", "save"])
    def a_name_that_nobody_has(self, verb):
        with self.untouched(ValueError):
            if verb == "set":
                self.model.set_adapter("nobody")
            elif verb == "delete":
                self.model.delete_adapter("nobody")
            elif verb == "swap":
                self.a_file("sfp")
                self.model.hotswap_adapter(self.folder / "sfp", name="nobody")
            else:
                self.model.save(self.folder / "nobody", name="nobody")

    def a_file(self, method):
        adaptkit.attach(copy.deepcopy(self.bare), *METHODS[method]).save(self.folder / method)
        return self.folder / method

    @rule(lambda self: self.is_attached, bad=["option", "target", "truncated", "foreign", "missing"])
    def add_what_cannot_be(self, bad):
        folder = self.a_file("sfp")
        weights = folder / "adapter_model.safetensors"
        if bad == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        if bad == "foreign":
            weights.write_bytes(b"not at all")
        what = {
            "option": ("vit-adapter", {"nonsense": 1}),
            "target": ("lora", {"target_modules": ["nothing"]}),
            "missing": "no-such-adapter",
        }.get(bad, folder)
        with self.untouched(ValueError):
            self.model.add_adapter(what, name="new")

    @rule(lambda self: self.is_active, bad=["method", "missing", "shape"])
    def tensors_that_do_not_fit(self, bad):
        tensors = stirred(self.sets[self.active].tensors, self.next_seed())
        last = list(tensors)[-1]
        if bad == "missing":
            del tensors[last]
        if bad == "shape":
            tensors[last] = torch.zeros(*tensors[last].shape, 2)
        with self.untouched(ValueError):
            if bad == "method":
                other = "sfp" if "sfp" not in self.sets[self.active].method else "metaformer"
                self.model.hotswap_adapter(self.a_file(other))
            else:
                self.model.load_adapter_state_dict(tensors)

    @rule(lambda self: self.is_attached, what=["host", "inner", "model", "many"])
    def attach_to_what_is_taken(self, what):
        from adaptkit.core.registry import view

        inner = view(copy.deepcopy(self.bare)).backbone
        inner = next(m for m in self.backbone.modules() if type(m) is type(inner))
        words = "" if what == "model" else r"(?s)(?=.*add_adapter)(?=.*attach_many)(?=.*detach)"
        with self.untouched(ValueError, RuntimeError, TypeError, match=words):
            if what == "many":
                adaptkit.attach_many(self.backbone, {"seg": "sfp"})
            else:
                adaptkit.attach({"host": self.backbone, "inner": inner, "model": self.model}[what], "sfp")

    @rule(lambda self: self.is_attached)
    def an_image_of_another_shape(self):
        with self.untouched(ValueError):
            self.model(self.x[0])

    # --------------------------------------------------------------------------------------------------- copies and ends

    @rule(lambda self: self.is_attached)
    def copied(self):
        other = copy.deepcopy(self.model)
        found = said(self.model, self.x)
        assert equal(said(other, self.x), found)
        if self.active is not None:
            with torch.no_grad():
                for p in other.sets[self.active].parameters():
                    p.add_(1.0)
        back = other.detach()
        assert back is not self.backbone
        assert equal(said(self.model, self.x), found)
        assert self.before_values(back) == []

    def before_values(self, host):
        now = {**dict(host.named_parameters()), **dict(host.named_buffers())}
        return [n for n, v in self.before.values.items() if "lora_" not in n and not torch.equal(value(now[n]), v)]

    @rule(lambda self: self.is_attached)
    def detach(self):
        model, self.model = self.model, None
        assert model.detach() is self.backbone
        assert self.before.changes() == []
        for call in (
            lambda: model(self.x),
            lambda: model.set_adapter(next(iter(self.sets), "a")),
            lambda: model.add_adapter("lora", name="late"),
            lambda: model.merge_adapter(),
            lambda: model.unmerge_adapter(),
            lambda: model.disable_adapter().__enter__(),
            lambda: model.detach(),
        ):
            with pytest.raises(RuntimeError):
                call()
        model = None
        gc.collect()
        assert self.before.changes() == []
        if self.form == "peft":  # its LoRA was trained in place
            self.pristine = copy.deepcopy(self.backbone)


SEEDS = {"peft": 3, "bnb": 3, "torchao": 1}  #: by which every verb is called and every state met
#: Each host as itself, and each form on some host: what differs between forms does not depend on the backbone.
PAIRS = [
    ("timm-vit", "bare"),
    ("timm-beit", "bare"),
    ("hf-dinov2", "bare"),
    ("timm-vit", "peft"),
    ("timm-vit", "compiled-around"),
    ("hf-dinov2", "compiled-in-place"),
    ("hf-dinov2", "bnb"),
    ("timm-vit", "torchao"),
]
EVERY = [(name, form) for name in HOST for form in FORMS]


def run(name, form, folder, seed, steps):
    if form in NEEDS and importlib.util.find_spec(NEEDS[form]) is None:
        pytest.skip(f"{NEEDS[form]} is not installed")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        machine = Verbs(name, form, folder, seed)
        machine.go(steps)
    return machine


@pytest.mark.parametrize(("name", "form"), [pytest.param(n, f, id=f"{n}-{f}") for n, f in PAIRS])
def test_after_any_verb_the_model_says_what_one_built_afresh_says(name, form, tmp_path):
    machine = run(name, form, tmp_path, seed=SEEDS.get(form, 10), steps=40)
    assert [verb for verb, count in machine.used.items() if not count] == []
    assert machine.seen >= ({"plain", "beside"} if form in NEEDS else {"plain", "beside", "merged"})


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("name", "form"), [pytest.param(n, f, id=f"{n}-{f}") for n, f in EVERY])
def test_after_many_more_verbs_too(name, form, seed, tmp_path):
    run(name, form, tmp_path, seed, steps=60)
