"""Interrupts of a run, wherever they come: what it has made is kept, and it goes on as if there had been none."""

import atexit
import signal
import threading
import time

import pytest

from .small_runs import same


@pytest.fixture(scope="module")
def config(config):
    return lambda side, **values: config(side, **{"steps": 4, "learning_rate": 1e-3, **values})


def test_an_interrupt_in_the_middle_of_a_step_loses_that_step_alone(train, module, model, data, config, tmp_path):
    """The host looks for it in every layer: here in a teacher's call, with half of the gradients made."""
    import comfy.model_management as management

    settings, calls = config("detail", gradient_accumulation_steps=2), []
    whole = train(model, data, settings, tmp_path / "whole")

    def press(*_):
        calls.append(1)
        if len(calls) == 40:
            management.interrupt_current_processing(True)

    hook = model.model.diffusion_model.head.register_forward_pre_hook(press)
    with pytest.raises(management.InterruptProcessingException):
        train(model, data, settings, tmp_path / "parts")
    hook.remove()
    _, saved = module("dcm_core.distill.checkpoints").newest_checkpoint(tmp_path / "parts")
    assert 0 < saved.steps < 4
    again = train(model, data, settings, tmp_path / "parts")
    assert same(whole.expert, again.expert) and whole.history == again.history


@pytest.fixture
def said(module, monkeypatch):
    """What a run says on its node, and may do something at."""
    show, texts = module("nodes.host.training.show"), []
    monkeypatch.setattr(show, "tell", lambda text, node: texts.append(text))
    return texts


@pytest.mark.parametrize(
    ("node", "again"), [("7", "Queue again to continue."), (None, "Run the same command again to continue.")]
)
def test_an_interrupted_run_says_what_is_saved_and_the_next_where_it_resumes(
    node, again, said, train, model, data, config, tmp_path, monkeypatch
):
    import comfy.model_management as management

    settings = config("semantic")
    with monkeypatch.context() as patch, pytest.raises(management.InterruptProcessingException):
        patch.setattr(
            management,
            "throw_exception_if_processing_interrupted",
            lambda: press(management, said, "Step 2 of 4: loss "),
        )
        train(model, data, settings, tmp_path, node_id=node)
    assert said[-1] == f"Saved at step 2 of 4. {again}"
    said.clear()
    train(model, data, settings, tmp_path, node_id=node)
    assert said[0] == "Resumed from step 2 of 4."
    assert [text.splitlines()[1:] for text in said[1:]] == [["Resumed from step 2 of 4."]] * 2
    assert said[1].startswith("Step 3 of 4: loss ")


def press(management, said, words):
    """Interrupt once something was said."""
    if said and said[-1].startswith(words):
        raise management.InterruptProcessingException


def test_a_run_that_ends_before_its_first_step_says_that_nothing_is_saved(
    said, train, module, model, data, config, tmp_path, monkeypatch
):
    def fails(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(module("dcm_core.distill.trainer").Trainer, "_training_step", fails)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, config("semantic"), tmp_path, node_id="7")
    assert said[-1] == "Stopped before the first step was done. Nothing was saved. Queue again to continue."


def test_an_error_of_ours_says_itself_what_to_do(said, train, module, model, data, config, tmp_path, monkeypatch):
    def refuse(history, config):
        if len(history) == 2:
            raise module("dcm_core.errors").DCMError("Do this.")

    monkeypatch.setattr(module("dcm_core.distill.trainer"), "check_losses", refuse)
    with pytest.raises(ValueError, match="Do this"):
        train(model, data, config("semantic"), tmp_path, node_id="7")
    assert said[-1] == "Saved at step 2 of 4."


def test_an_interrupt_between_two_optimisers_is_not_saved(train, module, model, data, config, tmp_path, monkeypatch):
    learner, stepped = module("dcm_core.distill.learner").Learner, []
    settings = config("detail", save_every=1)
    whole = train(model, data, settings, tmp_path / "whole")
    step = learner.step

    def pressed(self, norm):
        stepped.append(self.name)
        if stepped.count("discriminator") == 3:
            raise KeyboardInterrupt
        step(self, norm)

    monkeypatch.setattr(learner, "step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, settings, tmp_path / "parts")
    monkeypatch.undo()
    assert module("dcm_core.distill.checkpoints").newest_checkpoint(tmp_path / "parts")[1].steps == 2
    again = train(model, data, settings, tmp_path / "parts")
    assert same(whole.expert, again.expert) and whole.history == again.history


@pytest.fixture
def ctrl_c():
    """A signal that interrupts, also where whoever started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # as a terminal's, to the main thread, whichever presses here
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_waits_until_the_checkpoint_is_written(
    ctrl_c, train, module, model, data, config, tmp_path, monkeypatch
):
    """Of one who is impatient, or of torchrun, which passes on what the terminal has sent to all."""
    show, file, pressed = module("nodes.host.training.run").Show, module("dcm_core.distill.checkpoint_file"), []
    write = file.write_tensors

    def press(*_):
        pressed.append(1)
        ctrl_c()

    def written(*args):
        press()
        write(*args)

    monkeypatch.setattr(show, "step", press)
    monkeypatch.setattr(file, "write_tensors", written)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, config("semantic"), tmp_path)
    assert len(pressed) == 2 and module("dcm_core.distill.checkpoints").newest_checkpoint(tmp_path)[1].steps == 1


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_an_interrupt_amid_an_update_waits_for_its_end(
    side, ctrl_c, train, module, model, data, config, tmp_path, monkeypatch
):
    """Weights that are changed in part would be worth nothing."""
    learner, settings = module("dcm_core.distill.learner").Learner, config(side)
    whole = train(model, data, settings, tmp_path / "whole")
    step = learner.step

    def pressed(self, norm):
        ctrl_c()
        step(self, norm)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner, "step", pressed)
        train(model, data, settings, tmp_path / "parts")
    assert module("dcm_core.distill.checkpoints").newest_checkpoint(tmp_path / "parts")[1].steps == 1
    again = train(model, data, settings, tmp_path / "parts")
    assert again.history == whole.history and same(again.expert, whole.expert)


def test_a_process_that_ends_waits_for_its_run_however_often_it_is_told(ctrl_c, module, monkeypatch):
    """The host's server trains in a thread of its own, which ends with the process."""
    import comfy.model_management as management

    places, registered, begun, saved, told = (
        module("nodes.host.training.base"),
        [],
        threading.Event(),
        threading.Event(),
        [],
    )
    monkeypatch.setattr(atexit, "register", registered.append)
    monkeypatch.setattr(management, "interrupt_current_processing", told.append)

    def run():
        with places.interrupted_at_exit():
            begun.set()
            while not told:
                time.sleep(0.01)
            ctrl_c()
            time.sleep(0.2)
            saved.set()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    with pytest.raises(KeyboardInterrupt):
        registered[0]()
    assert saved.is_set()
    thread.join()


def test_an_interrupt_loses_no_held_out_loss(train, module, model, data, config, tmp_path, monkeypatch):
    """The step before it is made and saved; the loss follows when the run goes on."""
    trainer_class, settings = (
        module("dcm_core.distill.trainer").Trainer,
        config("semantic", held_out=1, held_out_every=2),
    )
    whole = train(model, data, settings, tmp_path / "whole")

    def pressed(self):
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer_class, "held_out_loss", pressed)
            train(model, data, settings, tmp_path / "parts")
    again = train(model, data, settings, tmp_path / "parts")
    assert [entry["step"] for entry in again.history if "held_out" in entry] == [2, 4]
    assert again.history == whole.history
