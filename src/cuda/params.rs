//! The parameters of the kernels: a module for each file of `cuda/`, written by `build.rs` from the structs there. Pointers
//! are device addresses, 0 for null.

use cudarc::driver::DeviceRepr;

include!(concat!(env!("OUT_DIR"), "/params.rs"));
