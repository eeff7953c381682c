"""The peer's ClientApp, which loads, quantizes, wraps and trains the model in every single call.

It follows Flower's published app for language models (examples/flowertune-llm in adap/flower). As published: the model
is loaded in every call, 4 bits with the library's default arithmetic (float32), gradient checkpointing, batches of 16
padded to their longest. Changed, so that all contestants train the same: model, data, LoRA on all linear layers without
dropout, NF4 with double quantization, a constant learning rate; and transformers' Trainer in place of trl's heavier
one. The tuned peer has fedtune's settings: bf16 if the processor multiplies it natively, and no checkpointing. Ray's
workers import this file by name.
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from typing import Any

import torch
import transformers
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from workload import ALPHA, BATCH_EXAMPLES, EXAMPLES_PER_CLIENT, LEARNING_RATE, RANK, SEED

from fedtune.demo import Household, make_households
from fedtune.model.base_model import best_precision

IGNORED = -100  # the label of tokens outside the loss

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the received adapter on the households of this node's partition."""
    config = message.content.config_records["config"]
    base, local_steps, tuned = str(config["base"]), int(str(config["local-steps"])), bool(config["tuned"])
    model = open_model(base, tuned)
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    tokenizer = AutoTokenizer.from_pretrained(base)
    household = _households(int(context.node_config["num-partitions"]))[int(context.node_config["partition-id"])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=local_steps,
                per_device_train_batch_size=BATCH_EXAMPLES,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                use_cpu=True,
                bf16=tuned and _half_precision() == torch.bfloat16,
                gradient_checkpointing=not tuned,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=_tokenise(household, tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        )
        result = trainer.train()
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"train_loss": result.training_loss, "num-examples": len(household.rows)}),
        }
    )
    return Message(content, reply_to=message)


def initial_arrays(base: str) -> ArrayRecord:
    """Returns the initial A and B of a newly wrapped model, with which the server begins."""
    return ArrayRecord(get_peft_model_state_dict(open_model(base, tuned=False)))


def open_model(base: str, tuned: bool) -> PeftModel:
    """Loads the base, quantized by the same NF4 recipe as fedtune's, with the same adapter attached."""
    log: Any = transformers.logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_half_precision() if tuned else torch.float32,
    )
    dtype = _half_precision() if tuned else torch.bfloat16
    network: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=dtype)
    network = prepare_model_for_kbit_training(network, use_gradient_checkpointing=not tuned)  # type: ignore[no-untyped-call]
    adapter = LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(network, adapter)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _half_precision() -> torch.dtype:
    """Returns fedtune's choice of a type on this processor: bf16 if it multiplies it natively, else float32."""
    return torch.bfloat16 if best_precision(torch.device("cpu")) == "bf16" else torch.float32


# The published app also keeps its data set for the life of a worker process and tokenises a partition in every call.
@lru_cache(maxsize=1)
def _households(clients: int) -> list[Household]:
    return make_households(clients, SEED, EXAMPLES_PER_CLIENT)


def _tokenise(household: Household, tokenizer: Any) -> list[dict[str, list[int]]]:
    examples = []
    for row in household.rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        examples.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * len(prompt + answer),
                "labels": [IGNORED] * len(prompt) + answer,
            }
        )
    return examples
