//! End to end: real sandboxes, as a person starts them. Needs root, QEMU, and kapsel's other programs beside `kapsel`
//! (or in `KAPSEL_BIN_DIR`); without them each test says `skipped: why`.

mod faults;
mod files;
mod life;
mod limits;
mod pty;
mod run;
mod streams;
mod terminal;
mod world;
