"""LoRA on any nn.Module, as plain functions that need torch alone: inject, merge, save, serve.

The words that this package uses, one for each thing:

    base, base weights     the frozen model W, as it was before `inject`
    adapter                all A and B of one training, with their config
    pair                   the A and B of one module (or of one parameter): class `Pair`
    factors                the tensors A (rank, in) and B (out, rank)
    scale                  s = alpha / rank, or alpha / sqrt(rank) with rsLoRA
    update                 s B A x, which is added to W x; for a weight, s B A
    frozen start           A0 and B0, where an initialiser starts with B A != 0: the update is s (B A - B0 A0) x
    adapted weight         W + s B A
    geometry               how a kind of layer applies a pair: a subclass of `Adapter`, such as `LinearLoRA`
    variant                a mixin that changes one step for every geometry: `DoRA`, `ALoRA`, `ByWeight`
    target                 a module or parameter that the config selects
    plan                   what each target becomes, before anything is changed
    kind                   targets that differ only in names and tensor values, so that one plan serves them all
    recipe                 how A and B of one parameter are made, for all targets of one kind
    init, initialiser      a function that makes A and B for a new pair (inits.py)
    trained whole          trained itself, without A and B: modules_to_save, biases
    swap                   giving a module a subclass of its own class; it stays the same object
    wrapper                a module around a module, such as DDP or torch.compile's; names do not mention it
    record                 the `Injection` that `inject` leaves on the model
    bank                   many adapters on one running base
    slot                   a place in the bank for one adapter
    cell                   one layer's part of a bank
    row                    one example of a batch
    position               one token, patch or step of a row
    beam                   one of several continuations of a row in `generate`
    routing                which row uses which adapter
    fold                   put one adapter of a bank into the base weights for a while
"""

from lightning_lora.engine.calibration import start_adapters
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.inject import disabled, inject, remove
from lightning_lora.engine.layers import Adapter, Pair, adapters, pairs
from lightning_lora.engine.low_rank import effective_rank, stable_rank
from lightning_lora.engine.merge import merge, merged
from lightning_lora.engine.present import Injection, injection_of, injections
from lightning_lora.engine.report import AdaptedModule, InjectionReport
from lightning_lora.engine.state import adapter_state_dict, adapter_tensors, base_fingerprint, load_adapter_state_dict

__all__ = [
    "AdaptedModule",
    "Adapter",
    "Injection",
    "InjectionReport",
    "LoRAConfig",
    "Pair",
    "adapter_state_dict",
    "adapter_tensors",
    "adapters",
    "base_fingerprint",
    "disabled",
    "effective_rank",
    "inject",
    "injection_of",
    "injections",
    "load_adapter_state_dict",
    "merge",
    "merged",
    "pairs",
    "remove",
    "stable_rank",
    "start_adapters",
]
