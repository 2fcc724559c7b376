//! `qp` as a user sees it: every command run as a process. One program, so that it is linked once.

mod bench;
mod doctor;
mod page;
mod plan;
mod quantize;
mod run;
mod serve;
mod server;
mod tutorial;
