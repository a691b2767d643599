# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run that are known to be whole, and the one that a run resumes from."""

import json
from pathlib import Path

import torch.distributed
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from mosaic_tools.files import check_folder, read_json, writing
from mosaic_tools.recipe import RecipeArguments

COMPLETE = "complete.json"


def saving(what: str, args: RecipeArguments):
    """`writing` to the output folder; the error says what is intact and how to go on."""
    return writing(
        what,
        f" to {args.output_dir}",
        lambda: f"Make room, or mend what is named. {way_on(args)}",
    )


def way_on(args: RecipeArguments) -> str:
    """What a run that failed has left, and how to go on from there, in words."""
    if not args.CAN_RESUME:
        return "Repeat the command: what is finished is kept"
    folder = Path(args.output_dir)
    checkpoint, _ = newest_checkpoint(folder)
    intact = f"The last complete checkpoint is {checkpoint}. " if checkpoint else ""
    # As `choose_checkpoint` takes it.
    flag = "--resume_from_checkpoint last" if checkpoint or not has_model(folder) else "--overwrite"
    return f"{intact}Repeat the command with {flag}"


def has_model(folder: Path) -> bool:
    names = ("config.json", "model*.safetensors", "pytorch_model*.bin")
    return any(file for name in names for file in folder.glob(name))


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete once every process has written its part.

    Args:
        streams: the loader has a place in a stream, to be kept with the checkpoint.
    """

    def __init__(self, streams: bool):
        self.streams = streams

    def on_save(self, args, state, control, train_dataloader=None, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        with saving(folder.name, args):
            if self.streams:
                loader = train_dataloader
                place = {"shared by": (args.world_size, loader.num_workers)}
                place |= {"order": loader.dataset.order()}
                place |= {"loader": loader.state_dict()}
                torch.save(place, folder / f"stream-{args.process_index}.pt")
            if args.world_size > 1:
                torch.distributed.barrier()
            if state.is_world_process_zero:
                (folder / PRECISION).write_text(args.precision())
                mark_complete(folder)

    @staticmethod
    def load_place(loader, checkpoint: str, args):
        """Puts a loader where it was. ValueError: the stream was shared by others, or is new."""
        file = Path(checkpoint, f"stream-{args.process_index}.pt")
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} has no {file.name}: it is no checkpoint of a stream, or of fewer "
                "processes; resume with as many, and without --streaming where it was not given"
            )
        place = torch.load(file)
        if place["shared by"] != (args.world_size, loader.num_workers):
            processes, workers = place["shared by"]
            raise ValueError(
                f"{checkpoint} is of {processes} process(es) with --dataloader_num_workers "
                f"{workers}, this run has {args.world_size} with {loader.num_workers}: a stream is "
                "resumed by as many as shared it"
            )
        if place.get("order") != (order := loader.dataset.order()):
            raise ValueError(
                f"{checkpoint} is of a stream with {place.get('order', 'another order')}, this run "
                f"has {order}: give the same, or rows would be lost and others come twice"
            )
        loader.load_state_dict(place["loader"])


def mark_complete(folder: Path):
    """Writes the names and sizes of a checkpoint's files into it, in one step."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    partial = folder / f"{COMPLETE}.partial"
    partial.write_text(json.dumps(sizes, indent=2))
    partial.replace(folder / COMPLETE)


def what_is_torn(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, None if it is whole."""
    if not (folder / COMPLETE).is_file():
        return f"it was not finished, {COMPLETE} is missing"
    try:
        sizes = read_json(folder / COMPLETE)
    except ValueError as error:
        return f"{error}: what is whole is not known"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def newest_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint, what is wrong with each newer one)."""
    torn = []
    folders = [x for x in output_dir.glob("checkpoint-*") if x.name.split("-")[1].isdigit()]
    for folder in sorted(folders, key=lambda x: int(x.name.split("-")[1]), reverse=True):
        if not (reason := what_is_torn(folder)):
            return folder, torn
        torn.append(f"{folder}: {reason}")
    return None, torn


PRECISION = "precision.txt"


def change_of_precision(checkpoint: Path, args) -> str | None:
    """What to say where a run goes on in another precision than it had, as on another device."""
    file, now = checkpoint / PRECISION, args.precision()
    if not file.is_file() or (before := file.read_text()) == now:
        return None
    return f"{checkpoint} was trained in {before}, and goes on in {now} ({args.why_bf16})"


def checkpoint_to_resume(args: RecipeArguments) -> str | None:
    """What `choose_checkpoint` says in the main process, for all: they may see other disks."""
    choice = [choose_checkpoint(args) if args.process_index == 0 else None]
    return broadcast_object_list(choice)[0]


def choose_checkpoint(args: RecipeArguments) -> str | None:
    """The checkpoint asked for, None to start anew.

    Torn checkpoints are named and passed over by 'last', which starts anew if none is complete.

    Raises:
        ValueError: there is no output_dir, or a file in its place; files would be overwritten; or
            the checkpoint asked for is not there, not complete, or older than another, which 'last'
            would take.
    """
    if not args.output_dir:
        raise ValueError("give --output_dir, the folder that the model is written to")
    wanted, folder = args.resume_from_checkpoint, Path(args.output_dir)
    last = wanted == "last"
    check_folder(folder)
    newest, torn = newest_checkpoint(folder)
    inside = wanted and not last and Path(wanted).resolve().parent == folder.resolve()
    if wanted and not last:
        reason = what_is_torn(Path(wanted)) if Path(wanted).is_dir() else "there is no such folder"
        if reason:
            raise ValueError(f"resume_from_checkpoint {wanted}: {reason}")
        if inside and newest and newest.resolve() != Path(wanted).resolve():
            raise ValueError(f"{newest} is newer than {wanted}: move it away first")
    if last:
        for reason in torn:
            print(f"passed over {reason}")
        print(f"resuming from {newest or 'the start: there is no complete checkpoint'}")
    elif newest and not inside:
        raise ValueError(
            f"output_dir {folder} holds {newest.name} of another run: choose another folder, "
            "continue with --resume_from_checkpoint last, or move the checkpoints away"
        )
    # One that was killed before its first checkpoint has left its log, and no model.
    begun = (torn or (folder / "log.jsonl").exists()) and not has_model(folder)
    goes_on = inside or last and (newest or begun)
    if folder.exists() and any(folder.iterdir()) and not (goes_on or args.overwrite):
        other = "continue with --resume_from_checkpoint last, " if begun and not last else ""
        raise ValueError(
            f"output_dir {folder} is not empty: choose another, {other}or write into it with "
            "--overwrite"
        )
    chosen = wanted if wanted and not last else newest and str(newest)
    if chosen and not has_optimizer(Path(chosen)):
        raise ValueError(
            f"{chosen} has no optimizer's state, as --save_only_model leaves it: begin another "
            "run with its weights"
        )
    return chosen


def has_optimizer(checkpoint: Path) -> bool:
    """Whether it has an optimizer's state, as torch, FSDP or DeepSpeed names it."""
    return any(next(checkpoint.glob(x), None) for x in ("*optimizer*", "global_step*"))
