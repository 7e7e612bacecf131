//! Generated from `proto/*.proto`; nothing else.
#![allow(clippy::all, clippy::pedantic, missing_docs)]

tonic::include_proto!("anabranch.v1");
