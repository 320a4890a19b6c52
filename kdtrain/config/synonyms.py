"""Options of other trainers, each with the setting of this one."""

_PHASES = "is in optim.phases, a list: --optim.phases '[{epochs: 3, lr: 0.01}]'"
_TABLE = {
    "lr learning_rate base_lr init_lr": f"the learning rate {_PHASES}",
    "epochs epoch num_epochs max_epochs": f"the number of epochs {_PHASES}",
    "optimizer optimiser opt": "not yet: kdtrain trains with Nesterov SGD, section optim",
    "scheduler lr_scheduler sched": "the course of the learning rate is optim.schedule",
    "warmup": "warmup is optim.warmup_epochs",
    "batch bs train_batch_size": "the batch size is optim.batch_size",
    "accum gradient_accumulation gradient_accumulation_steps": "accumulation is optim.accumulate",
    "wd": "weight decay is optim.weight_decay",
    "clip clip_grad grad_clip max_norm": "gradient clipping is optim.clip_norm",
    "model_ema ema_decay": "the average of the weights is optim.ema",
    "gpus ngpu num_gpus gpu_ids devices world_size ddp distributed local_rank": (
        "not yet: kdtrain trains on one device, train.device"
    ),
    "gpu cuda cpu": "the device is train.device, such as cuda:0",
    "amp fp16 bf16 half mixed_precision dtype": (
        "mixed precision is train.precision: bfloat16 or float16"
    ),
    "num_workers": "loader threads are data.workers",
    "wandb use_wandb mlflow": "not yet: train.tensorboard logs for TensorBoard",
    "pretrained weights checkpoint ckpt load finetune": (
        "weights come from a run directory, init_from (`import` makes one of published weights)"
    ),
    "output output_dir out out_dir save_dir log_dir work_dir": "the run directory is --run-dir",
    "arch model backbone network net": "the network is model.name",
    "config cfg": "the recipe is the first argument",
    "data dataset data_dir data_path": "the images are data.kind and data.root",
    "image_size img_size imgsz resolution": "the side of the input is data.input_size",
    "num_classes": "identities are counted in the images (synthetic: data.identities)",
    "loss criterion": "the loss follows from task, section head and the weights of section target",
    "tau": "the temperature is target.temperature",
    "embedding_size embedding_dim embed_dim": "the width of the embedding is model.embedding",
    "sample_rate": "the share of the classes in a step is head.sample",
    "print_freq log_interval frequent": "the interval of the log is train.log_every",
    "people": "the number of identities is data.identities, of a triplet batch triplet.identities",
    "pictures": "images per identity are data.images_per_identity and triplet.images_per_identity",
    "patience": "early stopping is train.early_stop",
}
HINTS = {word: hint for words, hint in _TABLE.items() for word in words.split()}
"""Hints by the last part of a name, in lower case with underscores."""
