//! What the other commands say to a supervisor, as lines of JSON over its socket, and the threads
//! that answer them.

mod client;
mod server;
mod words;

pub use client::Client;
pub use server::{Order, serve};
pub use words::{Answer, Reply, Request, State, Status};
