"""Names of other trainers' options, each with the setting of this one."""

_DEVICE = "not yet: kdtrain trains on one device, train.device"
_PHASES = "is in optim.phases, a list: --optim.phases '[{epochs: 3, lr: 0.01}]'"
_PRECISION = "mixed precision is train.precision: bfloat16 or float16"
_START = "weights come from a run directory, init_from (`import` makes one of published weights)"
_TABLE = {
    "lr learning_rate base_lr init_lr": f"the learning rate {_PHASES}",
    "epochs epoch num_epochs max_epochs n_epochs": f"the number of epochs {_PHASES}",
    "steps max_steps milestones": f"the length of a run {_PHASES}",
    "optimizer optimiser opt": "not yet: kdtrain trains with Nesterov SGD, section optim",
    "scheduler lr_scheduler sched": "the course of the learning rate is optim.schedule",
    "batch bs train_batch_size": "the batch size is optim.batch_size",
    "wd": "weight decay is optim.weight_decay",
    "clip clip_grad grad_clip max_norm": "gradient clipping is optim.clip_norm",
    "accum grad_accum gradient_accumulation gradient_accumulation_steps accum_iter": (
        "gradient accumulation is optim.accumulate"
    ),
    "warmup warmup_epoch": "warmup is optim.warmup_epochs",
    "model_ema ema_decay": "the average of the weights is optim.ema",
    "gpus ngpu num_gpus gpu_ids devices world_size nproc ddp distributed local_rank": _DEVICE,
    "gpu cuda cpu": "the device is train.device, such as cuda:0",
    "amp fp16 bf16 half mixed_precision dtype": _PRECISION,
    "num_workers": "loader threads are data.workers",
    "wandb use_wandb mlflow": "not yet: train.tensorboard logs for TensorBoard",
    "pretrained weights checkpoint ckpt load finetune load_from": _START,
    "output output_dir out out_dir save_dir log_dir work_dir name exp_name": (
        "the run directory is --run-dir"
    ),
    "arch model backbone network net": "the network is model.name",
    "config cfg": "the recipe is the first argument",
    "data dataset data_dir data_path dataset_path": "the images are data.kind and data.root",
    "image_size img_size imgsz resolution": "the side of the input is data.input_size",
    "num_classes classes": "identities are counted in the images (synthetic: data.identities)",
    "augmentation aug transforms": "augmentation is the section augment",
    "val_split val_fraction": "held-out training images are data.validation_fraction",
    "loss criterion": "the loss follows from task, section head and the weights of section target",
    "tau kd_temperature": "the temperature is target.temperature",
    "smoothing": "label smoothing is target.label_smoothing",
    "embedding_size embedding_dim embed_dim": "the width of the embedding is model.embedding",
    "sample_rate partial_fc": "the share of the classes in a step is head.sample",
    "teacher_path teacher_ckpt": "the teacher is --teacher RUN, a run directory",
    "print_freq log_interval log_freq frequent": "the interval of the log is train.log_every",
    "save_freq save_interval": "the interval of checkpoints is train.save_every",
    "patience": "early stopping is train.early_stop",
    "no_cache": "caching of images is data.cache, of teacher outputs teacher.cache",
}
HINTS = {word: hint for words, hint in _TABLE.items() for word in words.split()}
"""Hints by the last part of a name, in lower case with underscores."""
