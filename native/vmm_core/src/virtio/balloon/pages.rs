//! From what the driver names to pages given back to the host.
//!
//! The inflate queue names pages by number, one by one and in any order; neighbours are given
//! back together, since each call into the kernel also flushes the guest's page tables. The
//! reporting queue names ranges, which are large already.

use virtio_core::buffers::GuestBuffers;
use virtio_core::discard::PAGE_SIZE;
use virtio_core::ram::GuestRam;

use super::metrics::BalloonMetrics;

/// Page numbers looked at in one go: what Linux puts into one request.
const PAGES_PER_BATCH: usize = 256;
/// Page numbers of a request that are looked at. A driver that keeps the rules never has so many.
const MAX_PAGES_PER_REQUEST: usize = 64 * PAGES_PER_BATCH;
/// A page number is 32 bits, little-endian.
const NUMBER_SIZE: usize = 4;

/// How many page numbers a request has, up to the limit.
pub(super) fn count(numbers: &GuestBuffers) -> usize {
    (numbers.len() / NUMBER_SIZE).min(MAX_PAGES_PER_REQUEST)
}

/// Give back the pages that a request of the inflate queue names; gives how many it named.
pub(super) fn inflate(numbers: &GuestBuffers, metrics: &mut BalloonMetrics) -> usize {
    let count = count(numbers);
    if numbers.len() / NUMBER_SIZE > count {
        metrics.oversized_requests += 1;
    }
    let mut first = 0;
    while first < count {
        let mut bytes = [0; PAGES_PER_BATCH * NUMBER_SIZE];
        let batch_len = PAGES_PER_BATCH.min(count - first);
        // `count` numbers are there, so the copy is whole.
        numbers.copy_to(first * NUMBER_SIZE, &mut bytes);
        let mut pages = [0; PAGES_PER_BATCH];
        let (whole, _) = bytes.as_chunks::<NUMBER_SIZE>();
        for (page, number) in pages.iter_mut().zip(whole) {
            *page = u32::from_le_bytes(*number);
        }
        if let Some(batch) = pages.get_mut(..batch_len) {
            batch.sort_unstable();
            discard_runs(numbers.ram(), batch, metrics);
        }
        first += batch_len;
    }
    metrics.inflated_pages += count as u64;
    count
}

/// Give back sorted pages, neighbours together.
fn discard_runs(ram: &GuestRam, sorted: &[u32], metrics: &mut BalloonMetrics) {
    // A page named twice is as good as a neighbour.
    for run in sorted.chunk_by(|page, next| next - page <= 1) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            let (first, last) = (u64::from(*first), u64::from(*last));
            discard(
                ram,
                first * PAGE_SIZE,
                (last - first + 1) * PAGE_SIZE,
                metrics,
            );
        }
    }
}

/// Give back the ranges that a request of the reporting queue names; gives how many it named.
pub(super) fn report(ranges: &GuestBuffers, metrics: &mut BalloonMetrics) -> usize {
    let ram = ranges.ram();
    let mut count = 0;
    for (address, len) in ranges.guest_ranges() {
        let len = len as u64;
        metrics.reported_pages += len / PAGE_SIZE;
        discard(ram, address, len, metrics);
        count += 1;
    }
    count
}

fn discard(ram: &GuestRam, address: u64, len: u64, metrics: &mut BalloonMetrics) {
    let pages = len.div_ceil(PAGE_SIZE);
    // The guest's mistake, or pages the host can not take: the guest has them still, and no harm
    // is done but for the memory, which the counter tells of.
    match ram.discard(address, len) {
        Ok(()) => metrics.discarded_pages += pages,
        Err(_) => metrics.failed_pages += pages,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_core::mock::{MockDriver, mock_ram};

    use super::*;

    const RAM_SIZE: usize = 0x40_0000;

    /// Memory of 1024 pages, each of which starts with 0xaa, and the numbers at 0.
    fn ram(numbers: &[u32]) -> (Arc<GuestRam>, MockDriver, GuestBuffers) {
        let ram = mock_ram(RAM_SIZE);
        let driver = MockDriver::new(&ram, 0x8000, 2);
        for page in 16..1024 {
            driver.write(page * PAGE_SIZE, &[0xaa]);
        }
        let bytes: Vec<u8> = numbers.iter().flat_map(|page| page.to_le_bytes()).collect();
        driver.write(0, &bytes);
        let mut buffers = GuestBuffers::new(Arc::clone(&ram));
        assert!(buffers.push(0, bytes.len()));
        (ram, driver, buffers)
    }

    fn discarded(driver: &MockDriver) -> Vec<u64> {
        let is_empty = |page: &u64| driver.read(page * PAGE_SIZE, 1) == [0];
        (16..1024).filter(is_empty).collect()
    }

    #[test]
    fn named_pages_go_back_in_any_order() {
        let (_ram, driver, numbers) = ram(&[30, 29, 28, 100, 31, 29, 500]);
        let mut metrics = BalloonMetrics::default();
        assert_eq!(inflate(&numbers, &mut metrics), 7);
        assert_eq!(discarded(&driver), [28, 29, 30, 31, 100, 500]);
        assert_eq!((metrics.inflated_pages, metrics.discarded_pages), (7, 6));
    }

    #[test]
    fn a_request_may_have_more_than_one_batch() {
        let pages: Vec<u32> = (100..700).rev().collect();
        let (_ram, driver, numbers) = ram(&pages);
        let mut metrics = BalloonMetrics::default();
        assert_eq!(inflate(&numbers, &mut metrics), 600);
        assert_eq!(discarded(&driver), (100..700).collect::<Vec<_>>());
    }

    #[test]
    fn pages_that_are_none_are_counted() {
        let (_ram, driver, numbers) = ram(&[0xffff_ffff, 1024, 20]);
        let mut metrics = BalloonMetrics::default();
        inflate(&numbers, &mut metrics);
        assert_eq!(discarded(&driver), [20]);
        assert_eq!((metrics.failed_pages, metrics.discarded_pages), (2, 1));
    }

    #[test]
    fn a_request_without_end_is_cut() {
        let (ram, driver, _) = ram(&[20]);
        let mut numbers = GuestBuffers::new(ram);
        // The same page, again and again.
        driver.write(0, &[20, 0, 0, 0].repeat(256));
        for _ in 0..1000 {
            assert!(numbers.push(0, 1024));
        }
        let mut metrics = BalloonMetrics::default();
        assert_eq!(inflate(&numbers, &mut metrics), MAX_PAGES_PER_REQUEST);
        assert_eq!(metrics.oversized_requests, 1);
        assert_eq!(discarded(&driver), [20]);
    }

    #[test]
    fn reported_ranges_go_back_whole() {
        let (ram, driver, _) = ram(&[]);
        let mut ranges = GuestBuffers::new(ram);
        assert!(ranges.push(0x20_0000, 0x4000));
        assert!(ranges.push(0x30_0000, 0x1000));
        assert!(ranges.push(0x31_0800, 0x1000));
        let mut metrics = BalloonMetrics::default();
        assert_eq!(report(&ranges, &mut metrics), 3);
        assert_eq!(discarded(&driver), [0x200, 0x201, 0x202, 0x203, 0x300]);
        assert_eq!((metrics.discarded_pages, metrics.failed_pages), (5, 1));
        assert_eq!(metrics.reported_pages, 6);
    }
}
