//! Random requests, cut anywhere, against a disk and a vector: both must say the same.

use std::fs;

use proptest::prelude::*;
use virtio_core::mock::MockBuffer;

use super::config::BlockConfig;
use super::config_space::FEATURE_FLUSH;
use super::device::Block;
use super::rig::*;
use crate::virtio::device::VirtioDevice;

/// More than a request of most of these actions.
const MODEL_SECTORS: u16 = 96;

#[derive(Clone, Debug)]
enum Action {
    Read {
        sector: u64,
        cuts: Vec<u16>,
        sectors: u16,
    },
    Write {
        sector: u64,
        cuts: Vec<u16>,
        sectors: u16,
        byte: u8,
    },
    Zero {
        sector: u64,
        sectors: u32,
        may_unmap: bool,
    },
    Discard {
        sector: u64,
        sectors: u32,
    },
    Flush,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let at = 0..u64::from(MODEL_SECTORS) + 2;
    let sectors = 0..40u16;
    let cuts = || prop::collection::vec(0u16..40 * 512, 0..90);
    let action = prop_oneof![
        3 => (at.clone(), sectors.clone(), cuts())
            .prop_map(|(sector, sectors, cuts)| Action::Read { sector, cuts, sectors }),
        3 => (at.clone(), sectors, cuts(), any::<u8>())
            .prop_map(|(sector, sectors, cuts, byte)| Action::Write { sector, cuts, sectors, byte }),
        1 => (at.clone(), 0..40u32, any::<bool>())
            .prop_map(|(sector, sectors, may_unmap)| Action::Zero { sector, sectors, may_unmap }),
        1 => (at, 0..40u32).prop_map(|(sector, sectors)| Action::Discard { sector, sectors }),
        1 => Just(Action::Flush),
    ];
    prop::collection::vec(action, 1..25)
}

/// `sectors` in pieces cut at these places, each some way from the other.
fn pieces(sectors: u16, cuts: &[u16], is_writable: bool) -> Vec<MockBuffer> {
    let len = sectors * 512;
    let mut edges: Vec<u16> = cuts.iter().copied().filter(|cut| *cut <= len).collect();
    edges.extend([0, len]);
    edges.sort_unstable();
    edges
        .windows(2)
        .zip(0..)
        .map(|(edge, index)| MockBuffer {
            address: DATA + u64::from(edge[0]) + index * 3,
            len: u32::from(edge[1] - edge[0]),
            is_writable,
        })
        .collect()
}

fn run_against_model(rig: &mut Rig, actions: Vec<Action>) {
    let mut model = pattern(usize::from(MODEL_SECTORS) * 512);
    for action in actions {
        let range = |sector: u64, sectors: u64| {
            let end = sector + sectors;
            let byte = |sector| usize::try_from(sector * 512).unwrap();
            (end <= MODEL_SECTORS.into()).then(|| byte(sector)..byte(end))
        };
        let expect = |range: &Option<std::ops::Range<usize>>, written: usize| match range {
            Some(_) => (OK, u32::try_from(written + 1).unwrap()),
            None => (IO_ERROR, 1),
        };
        match action {
            Action::Read {
                sector,
                cuts,
                sectors,
            } => {
                let range = range(sector, sectors.into());
                let buffers = pieces(sectors, &cuts, true);
                let answer = rig.request(IN, sector, &buffers);
                assert_eq!(answer, expect(&range, usize::from(sectors) * 512));
                if let Some(range) = range {
                    let mut bytes = Vec::new();
                    for buffer in buffers {
                        bytes.extend(rig.driver.read(buffer.address, buffer.len as usize));
                    }
                    assert_eq!(bytes, model[range]);
                }
            }
            Action::Write {
                sector,
                cuts,
                sectors,
                byte,
            } => {
                let range = range(sector, sectors.into());
                let content: Vec<u8> = pattern(usize::from(sectors) * 512)
                    .iter()
                    .map(|pattern| pattern ^ byte)
                    .collect();
                let buffers = pieces(sectors, &cuts, false);
                let mut rest = &content[..];
                for buffer in &buffers {
                    let (piece, after) = rest.split_at(buffer.len as usize);
                    rig.driver.write(buffer.address, piece);
                    rest = after;
                }
                assert_eq!(rig.request(OUT, sector, &buffers), expect(&range, 0));
                if let Some(range) = range {
                    model[range].copy_from_slice(&content);
                }
            }
            Action::Zero {
                sector,
                sectors,
                may_unmap,
            } => {
                let range = range(sector, sectors.into());
                rig.driver
                    .write(DATA, &segment(sector, sectors, may_unmap.into()));
                assert_eq!(
                    rig.request(WRITE_ZEROES, 0, &to_disk(16)),
                    expect(&range, 0)
                );
                if let Some(range) = range {
                    model[range].fill(0);
                }
            }
            Action::Discard { sector, sectors } => {
                let range = range(sector, sectors.into());
                rig.driver.write(DATA, &segment(sector, sectors, 0));
                assert_eq!(rig.request(DISCARD, 0, &to_disk(16)), expect(&range, 0));
                // On a file a discarded range reads as zeros.
                if let Some(range) = range {
                    model[range].fill(0);
                }
            }
            Action::Flush => assert_eq!(rig.request(FLUSH, 0, &[]), (OK, 1)),
        }
    }
    assert!(fs::read(rig.block.disk().path()).unwrap() == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn the_disk_is_what_a_vector_would_be(
        actions in actions(),
        is_direct: bool,
        has_event_idx: bool,
        has_flush: bool,
    ) {
        for engine in engines() {
            let file = disk_file(usize::from(MODEL_SECTORS) * 512);
            let block = Block::new(BlockConfig { is_direct, ..config(&file, engine) }).unwrap();
            let mut features = block.features();
            if !has_event_idx {
                features &= !virtio_core::features::EVENT_IDX;
            }
            if !has_flush {
                features &= !FEATURE_FLUSH;
            }
            let mut rig = Rig::with_features(block, features);
            run_against_model(&mut rig, actions.clone());
        }
    }
}
