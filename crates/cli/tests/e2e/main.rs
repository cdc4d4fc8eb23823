//! End to end: real sandboxes, as a person starts them. Needs root, QEMU, and kapsel's other programs beside `kapsel`
//! (or in `KAPSEL_BIN_DIR`); without them each test says `skipped: why`.

mod bridge;
mod broken;
mod faults;
mod files;
mod host;
mod life;
mod limits;
mod network;
mod place;
mod pty;
mod refused;
mod run;
mod standby;
mod streams;
mod templates;
mod terminal;
mod world;
