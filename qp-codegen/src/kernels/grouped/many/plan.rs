//! How a product of many tokens is laid over a GPU, and the sizes that follow.

use super::super::Product;
use super::super::layout::Relaid;
use super::super::operands::{OF_PRODUCT, are_operands};
use crate::ir::group_columns;
use crate::layout::CELL;
use crate::spec::terms::TILE;

/// Most tokens of a part, whose sums fit the registers.
pub const MAX_PART: u32 = 64;
/// Chunks of activations in shared memory: one is multiplied, one is added up, one arrives.
pub(super) const STAGES: u32 = 3;
/// Chunks whose sums over runs are in shared memory.
pub(super) const SUMMED: u32 = 2;
/// Planes that [`Group::narrow`] multiplies at once.
const NARROW: u32 = 32;

/// How the work is laid over the GPU. The result does not depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Groups of four warps, one below the other, multiply together: only where there is `wgmma`.
    pub group: Option<Group>,
    /// Warps one below the other, each with rows of tiles of its own.
    pub row_warps: u32,
    /// Warps that share the columns of the same rows.
    pub col_warps: u32,
    /// Rows of tiles that a warp takes at once; 1 for groups.
    pub row_tiles: u32,
    /// Tiles, side by side, that a warp takes of a chunk.
    pub chunk: u32,
    /// Tiles, of a chunk's number a divisor, whose words are on their way.
    pub ahead: u32,
    /// Parts of the tokens, each with blocks of its own.
    pub token_parts: u32,
    /// Blocks that share the rows of tiles (the grid has `blocks · token_parts`).
    pub blocks: u32,
    /// Blocks an SM must hold at once.
    pub min_blocks: u32,
    /// Whether blocks copy the table of digits, if there is one, into shared memory; else they look it up in global memory.
    pub shared_book: bool,
}

/// How groups of four warps multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Planes of the activations at once, as [`group_columns`] gives them.
    pub planes: u32,
    /// Sets of registers that their sums take in turn. Of two, one is added while the other is computed; where there is one, other
    /// groups multiply while it is added.
    pub sets: u32,
}

impl Group {
    /// All planes of `tokens` tokens in two halves, which take turns.
    pub fn halves(tokens: u32) -> Group {
        let planes = group_columns(2 * tokens);
        // Up to 32 planes are as fast as 32.
        Group { planes: if planes <= 32 { planes } else { group_columns(planes / 2) }, sets: 2 }
    }

    /// A few planes at a time, in few registers.
    pub fn narrow(tokens: u32) -> Group {
        Group { planes: group_columns(2 * tokens).min(NARROW), sets: 1 }
    }
}

impl Launch {
    /// Warps of a block.
    pub fn warps(&self) -> u32 {
        self.row_warps * self.col_warps
    }
}

/// Sizes that follow from the operation and its launch.
pub(in super::super) struct Plan {
    pub(in super::super) layout: Relaid,
    /// Tokens of a part; the last may have fewer.
    pub(in super::super) tokens: u32,
    /// Tensor-core products side by side, of 8 planes each, to hold all planes of a part.
    pub(in super::super) groups: u32,
    /// Runs of a tile.
    pub(in super::super) runs: u32,
    pub(in super::super) chunks: u32,
    /// Times that the warps take rows, in the block that has most.
    pub(in super::super) rounds: u32,
    /// Tiles of a chunk.
    pub(super) chunk_tiles: u32,
    /// Whether sums of activations over runs are needed.
    pub(in super::super) offsets: bool,
}

impl Plan {
    pub(in super::super) fn new(op: &Product, launch: &Launch) -> Plan {
        let layout = op.layout();
        let tokens = op.batch.div_ceil(launch.token_parts);
        let planes = if launch.group.is_some() { group_columns(2 * tokens) } else { (2 * tokens).next_multiple_of(8) };
        let chunk_tiles = launch.col_warps * launch.chunk;
        Plan {
            tokens,
            groups: planes / 8,
            runs: op.runs(),
            chunks: layout.col_tiles().div_ceil(chunk_tiles),
            rounds: layout.row_tiles().div_ceil(launch.blocks).div_ceil(launch.row_warps * launch.row_tiles),
            chunk_tiles,
            offsets: op.has_offsets(are_operands(op)),
            layout,
        }
    }

    /// Steps of a warp through the columns.
    pub(in super::super) fn steps(&self, launch: &Launch) -> u32 {
        self.chunks * launch.chunk
    }

    /// Cells of the same columns in shared memory: planes, and what fills up the last product.
    pub(super) fn planes(&self) -> u32 {
        self.groups * 8
    }

    /// Cells of a tile's columns.
    pub(super) fn tile_cells(&self) -> u32 {
        TILE / CELL * self.planes()
    }

    /// Cells of a staged chunk.
    pub(in super::super) fn stage_cells(&self) -> u32 {
        self.chunk_tiles * self.tile_cells()
    }

    /// Sums over runs of a tile: by run, by token.
    pub(super) fn tile_offsets(&self) -> u32 {
        self.runs * self.groups * OF_PRODUCT
    }

    /// Sums over runs of a chunk.
    pub(super) fn chunk_offsets(&self) -> u32 {
        if self.offsets { self.chunk_tiles * self.tile_offsets() } else { 1 }
    }

    /// Sums of 64 bits of a block, where those of several warps meet.
    pub(super) fn meeting_sums(&self, launch: &Launch) -> u32 {
        if launch.col_warps == 1 { 1 } else { launch.warps() * launch.row_tiles * self.groups * 2 * 32 }
    }

    /// Bytes of shared memory.
    pub(in super::super) fn shared_bytes(&self, launch: &Launch) -> u32 {
        let book = if launch.shared_book { self.layout.book_bytes() } else { 0 };
        STAGES * self.stage_cells() * 16 + SUMMED * self.chunk_offsets() * 4 + self.meeting_sums(launch) * 8 + book
    }
}
