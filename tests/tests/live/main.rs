//! Mirrors of disks that are written meanwhile, in one program.

mod amplification;
mod known_bugs;
mod stress;
