"""The explorer as a local page, with NiceGUI: it shows what :class:`Explorer` computes, and nothing leaves this machine."""

from __future__ import annotations

import socket
from typing import Any

from .explorer import Explorer, Neighbour, View

__all__ = ["free_port", "serve"]

HOST = "127.0.0.1"
GALLERY = 18
STEPS = 24  # of an animation
STYLE = """
<style>
  .picture { display: block; margin: 0 auto; width: 100%; max-width: 220px; image-rendering: pixelated; border-radius: 6px }
  .thumb { width: 44px; height: 44px; object-fit: contain; image-rendering: pixelated; cursor: pointer; border-radius: 4px }
  .thumb:hover { outline: 2px solid #2f6fde }
  .views { position: sticky; top: 0; z-index: 5 }
  .nicegui-content { max-width: 1200px; margin: 0 auto }
</style>
"""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def serve(explorer: Explorer, *, port: int, browser: bool = True) -> None:
    """Shows the page at ``http://127.0.0.1:port`` until Ctrl-C; ``browser`` opens one.

    Raises:
        ImportError: nicegui is missing.
    """
    try:
        from nicegui import app, ui
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as missing:
        raise ImportError(f"explore needs {missing.name}: pip install 'iin-fast[explore]'") from missing
    # A page elsewhere whose name was pointed at this machine gets nothing.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    options: dict[str, Any] = {
        "host": HOST,
        "port": port,
        "show": browser,
        "reload": False,
        "dark": None,
        "show_welcome_message": False,
    }
    ui.run(
        lambda: Page(explorer.fresh()),
        title=f"{explorer.run.name} · iin-fast",
        **options,
        uvicorn_logging_level="warning",
    )


class Page:
    """The page of one visitor: widgets, and what each does with the explorer."""

    def __init__(self, explorer: Explorer) -> None:
        from nicegui import ui

        self.ui, self.explorer, self.seed = ui, explorer, 0
        sizes = ", ".join(f"{name} {size}" for name, size in explorer.model.sizes.items())
        ui.add_head_html(STYLE)
        with ui.column().classes("w-full gap-1"):
            ui.label(explorer.run.name or str(explorer.run)).classes("text-h5")
            ui.label(f"{len(explorer.rows)} samples · factors: {sizes}").classes("text-caption")
        self.donor = explorer.unlike(explorer.sample)
        columns = "grid-cols-3" if explorer.shown.as_image else "sm:grid-cols-3"
        with ui.grid().classes(f"views w-full gap-2 {columns}"):
            self.cards = {
                name: ui.card().classes("w-full items-center gap-1 p-2").props(f"data-testid=view-{name}")
                for name in ("A", "edited", "B")
            }
        with ui.card().classes("w-full"):
            with ui.row().classes("w-full items-center gap-2"):
                self.role = ui.toggle(["choose A", "choose B"], value="choose A").props("dense no-caps")
                row = ui.number("row", format="%d", precision=0).props("dense outlined data-testid=row").classes("w-24")
                row.on("keydown.enter", lambda: self.pick(row.value))
                ui.button("Others", icon="casino", on_click=self.others).props("dense no-caps flat data-testid=others")
            self.gallery = ui.row().classes("w-full gap-1")
        with ui.row().classes("w-full items-center gap-2"):
            ui.button("Play A → B", icon="play_arrow", on_click=self.play).props("dense no-caps data-testid=play")
            self.moving = ui.select(["all factors", *explorer.axes], value="all factors").props("dense outlined")
            ui.button("Undo all", icon="undo", on_click=self.reset).props("dense no-caps flat data-testid=reset")
        self.timer = ui.timer(0.06, self.step, active=False)
        self.panels = ui.grid().classes("w-full gap-3 sm:grid-cols-2 lg:grid-cols-3")
        with ui.expansion("This edit as Python", icon="code", value=True).classes("w-full"):
            self.code = ui.code(language="python").classes("w-full").props("data-testid=code")
        self.draw_gallery()
        self.draw_panels()
        self.draw_ends()
        self.refresh()

    def refresh(self) -> None:
        """Show the edited latent and its code. Sliders keep what they say."""
        view = self.explorer.view()
        with self.cleared("edited", "edited"):
            self.draw_view(view, view.picture)
            for neighbour in view.neighbours:
                self.draw_neighbour(neighbour)
        self.code.set_content(self.explorer.code())

    def draw_ends(self) -> None:
        """Show A, and B that gives."""
        for name, row in (("A", self.explorer.sample), ("B", self.donor)):
            with self.cleared(name, f"{name}: row {row}"):
                self.draw_view(self.explorer.view_of(row), self.explorer.picture_of(row))
                self.ui.label(self.explorer.text_of(row)).classes("text-caption text-center")

    def cleared(self, name: str, title: str) -> Any:
        """The card of that name with its title alone."""
        card = self.cards[name]
        card.clear()
        with card:
            self.ui.label(title).classes("text-bold")
        return card

    def draw_view(self, view: View, picture: str | None) -> None:
        """A picture, and how usual the latent is."""
        ui = self.ui
        if picture:
            ui.html(f'<img class="picture" alt="" src="{picture}">', sanitize=False).classes("w-full")
        ui.label(f"log p(z) {view.log_prob:.1f} nats").classes("text-caption text-center")
        with ui.label(f"outlier score {view.outlier_score:.2f}").classes("text-caption text-center"):
            ui.tooltip("the share of the samples that is likelier")

    def draw_neighbour(self, near: Neighbour) -> None:
        """A sample near the edited latent."""
        ui = self.ui
        with ui.column().classes("w-full items-center gap-0"):
            if near.picture:
                ui.html(f'<img class="picture" alt="row {near.row}" src="{near.picture}">', sanitize=False)
            ui.label(f"{near.text} (row {near.row}, distance {near.distance:.2f})").classes("text-caption text-center")

    def draw_panels(self) -> None:
        """A card for each factor: the swap, the way to B, and a slider for each axis."""
        ui, explorer = self.ui, self.explorer
        self.panels.clear()
        self.shares: dict[str, Any] = {}
        with self.panels:
            for factor, axes in explorer.axes.items():
                with (
                    ui.card().classes("w-full gap-1").props(f'data-testid="factor-{list(explorer.axes).index(factor)}"')
                ):
                    with ui.row().classes("w-full items-center justify-between"):
                        ui.label(f"{factor} · {explorer.model.sizes[factor]} dimensions").classes("text-bold")
                        ui.button("Swap with B", on_click=lambda f=factor: self.swap(f)).props("dense no-caps")
                    share = explorer.given.get(factor, (0, 0.0))[1]
                    self.shares[factor] = self.slider(
                        "towards B", 0, 1, share, lambda e, f=factor: self.give(f, e.value)
                    )
                    for name, axis in axes.items():
                        position = explorer.moved.get((factor, name), 0.0)
                        self.slider(
                            name, axis.low, axis.high, position, lambda e, f=factor, a=name: self.move(f, a, e.value)
                        )

    def slider(self, name: str, low: float, high: float, value: float, moved: Any) -> Any:
        """A slider with its name and value."""
        ui = self.ui
        with ui.row().classes("w-full items-center no-wrap gap-3"):
            ui.label(name).classes("text-caption w-28 shrink-0")
            made = ui.slider(min=low, max=high, step=0.05, value=value, on_change=moved).props(
                f'dense aria-label="{name}"'
            )
            ui.label().classes("text-caption w-10 shrink-0 text-right").bind_text_from(made, "value", "{:.2f}".format)
        return made

    def draw_gallery(self) -> None:
        """Samples to choose from."""
        ui, explorer = self.ui, self.explorer
        self.gallery.clear()
        with self.gallery:
            for row in explorer.draw(GALLERY, self.seed):
                picture = explorer.picture_of(row)
                if picture is None:
                    made = ui.chip(explorer.text_of(row)).props("clickable dense")
                else:
                    made = ui.html(f'<img class="thumb" alt="row {row}" src="{picture}">', sanitize=False)
                made.props(f"data-testid=sample-{row}").on("click", lambda _, r=row: self.pick(r))

    def pick(self, row: float | None) -> None:
        """Take a sample as A, which is changed, or as B, which gives."""
        if row is None:
            return
        row = int(row)
        if row not in self.explorer.rows:
            self.ui.notify(f"row {row} is none of the samples that are shown")
            return
        if self.role.value == "choose A":
            self.explorer.choose(row)
            self.draw_panels()
        else:
            self.donor = row
        self.draw_ends()
        self.refresh()

    def others(self) -> None:
        """Other samples to choose from."""
        self.seed += 1
        self.draw_gallery()

    def swap(self, factor: str) -> None:
        """Take all of a factor from B, which may have been another sample when the slider moved there."""
        self.shares[factor].set_value(1.0)
        self.give(factor, 1.0)

    def give(self, factor: str, share: float) -> None:
        """Take a share of a factor from B."""
        self.explorer.give(factor, self.donor, share)
        self.refresh()

    def move(self, factor: str, axis: str, position: float) -> None:
        """Move along an axis."""
        self.explorer.move(factor, axis, position)
        self.refresh()

    def reset(self) -> None:
        """Back to A."""
        self.timer.deactivate()
        self.explorer.reset()
        self.draw_panels()
        self.refresh()

    def play(self) -> None:
        """Start on the way from A to B, in all factors or one."""
        self.reset()
        self.position = 0
        self.timer.activate()

    def step(self) -> None:
        """One picture of the animation."""
        self.position += 1
        for factor in self.explorer.axes if self.moving.value == "all factors" else (self.moving.value,):
            self.shares[factor].set_value(self.position / STEPS)
        if self.position == STEPS:
            self.timer.deactivate()
