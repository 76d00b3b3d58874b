pub mod packet;
pub mod program;
