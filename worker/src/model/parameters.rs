//! A model's parameters: flat tensors, one for each bucket, that are there, on their way between workers, or (sharded) here
//! only while somebody computes with them.

use super::Error;
use crate::ops::{phantom, view};
use crate::optim::state;
use std::ops::Range;
use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Layout, CHUNK};

/// The parameters of one model.
pub(super) struct Parameters {
    compute: Kind,
    device: Device,
    /// Of each bucket what the model computes with: `[elements]`.
    present: Vec<Option<Tensor>>,
    /// The same on the host, where the device is another: what the optimizer writes and workers exchange.
    mirrors: Option<Vec<Option<Tensor>>>,
    /// The optimizer writes on the device, and workers exchange what lies there; mirrors are what was last brought home.
    lives_there: bool,
    /// Sharded: the own elements of each bucket, and where they lie in it.
    own: Option<Vec<(Range<usize>, Tensor)>>,
    /// The same on the device, where they live there.
    own_there: Vec<Tensor>,
}

fn zeros(elements: usize, options: (Kind, Device)) -> Tensor {
    Tensor::zeros([elements as i64], options)
}

impl Parameters {
    /// All zero, all here.
    pub fn whole(layout: &Layout, compute: Kind, device: Device) -> Self {
        let all = |device| layout.buckets.iter().map(move |b| Some(zeros(b.elements, (compute, device)))).collect();
        let mirrors = (device != Device::Cpu).then(|| all(Device::Cpu));
        Parameters {
            compute,
            device,
            present: all(device),
            mirrors,
            lives_there: false,
            own: None,
            own_there: Vec::new(),
        }
    }

    /// All zero; only the elements `own` of each bucket are kept.
    pub fn sharded(layout: &Layout, compute: Kind, device: Device, own: &[Range<usize>]) -> Self {
        let absent = || layout.buckets.iter().map(|_| None).collect();
        let own = own.iter().map(|own| (own.clone(), zeros(own.len(), (compute, Device::Cpu)))).collect();
        let mirrors = (device != Device::Cpu).then(absent);
        let own = Some(own);
        Parameters { compute, device, present: absent(), mirrors, lives_there: false, own, own_there: Vec::new() }
    }

    fn here(compute: Kind, present: Vec<Option<Tensor>>) -> Self {
        let (device, own_there) = (Device::Cpu, Vec::new());
        Parameters { compute, device, present, mirrors: None, lives_there: false, own: None, own_there }
    }

    /// From now on the optimizer writes on the device, and what travels lies there.
    pub fn live_there(&mut self) -> Result<(), Error> {
        self.lives_there = self.mirrors.is_some();
        if self.lives_there {
            let there = |(_, own): &(Range<usize>, Tensor)| own.f_to_device_(self.device, self.compute, false, true);
            self.own_there = self.own.iter().flatten().map(there).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    /// Where what travels lies.
    pub fn travels_on(&self) -> Device {
        if self.lives_there {
            self.device
        } else {
            Device::Cpu
        }
    }

    /// Brings the host's copy up to date, where it is but a copy.
    pub fn bring_home(&mut self) {
        if !self.lives_there {
            return;
        }
        for ((_, own), there) in self.own.iter_mut().flatten().zip(&self.own_there) {
            own.copy_(there);
        }
        for (mirror, here) in self.mirrors.iter_mut().flatten().zip(&self.present) {
            if let (Some(mirror), Some(here)) = (mirror, here) {
                mirror.copy_(here);
            }
        }
    }

    /// No memory stands behind them.
    pub fn phantom(layout: &Layout, compute: Kind) -> Option<Self> {
        let present: Option<_> = layout.buckets.iter().map(|b| phantom::flat(compute, b.elements).map(Some)).collect();
        Some(Parameters::here(compute, present?))
    }

    /// The same where the host has them all, for computing there.
    pub fn on_host(&self) -> Option<Self> {
        let mirrors = self.mirrors.as_ref()?;
        let present: Option<_> = mirrors.iter().map(|b| b.as_ref().map(|b| Some(b.shallow_clone()))).collect();
        Some(Parameters::here(self.compute, present?))
    }

    #[cfg(test)]
    pub fn pretend_another_device(&mut self) {
        self.mirrors = Some(self.present.iter().map(|b| b.as_ref().map(Tensor::zeros_like)).collect());
    }

    pub fn is_sharded(&self) -> bool {
        self.own.is_some()
    }

    pub fn has(&self, bucket: usize) -> bool {
        self.present[bucket].is_some() && (self.lives_there || self.host(bucket).is_some())
    }

    fn host(&self, bucket: usize) -> Option<&Tensor> {
        self.mirrors.as_ref().unwrap_or(&self.present)[bucket].as_ref()
    }

    pub fn bucket(&self, bucket: usize) -> &Tensor {
        self.present[bucket].as_ref().expect("a bucket is here while somebody computes with it")
    }

    pub fn host_mut(&mut self, bucket: usize) -> &mut Tensor {
        let buckets = self.mirrors.as_mut().unwrap_or(&mut self.present);
        buckets[bucket].as_mut().expect("a bucket is here while it is written")
    }

    /// The own part of a bucket on the host, and where it begins in the tensor; `begin`: where it does in the bucket.
    pub fn own(&self, bucket: usize, begin: usize) -> (&Tensor, usize) {
        match &self.own {
            Some(own) => (&own[bucket].1, 0),
            None => (self.host(bucket).expect("a bucket is here while it is read"), begin),
        }
    }

    /// The same on the device.
    pub fn own_away(&self, bucket: usize, begin: usize) -> (&Tensor, usize) {
        match (self.lives_there, &self.own) {
            (true, Some(_)) => (&self.own_there[bucket], 0),
            (true, None) => (self.bucket(bucket), begin),
            (false, _) => self.own(bucket, begin),
        }
    }

    pub fn own_mut(&mut self, bucket: usize, begin: usize) -> (&mut Tensor, usize) {
        if self.own.is_none() {
            return (self.host_mut(bucket), begin);
        }
        let own = self.own.as_mut().expect("looked at above");
        (&mut own[bucket].1, 0)
    }

    /// Takes a bucket away, as it is on the host.
    pub fn take(&mut self, bucket: usize) -> Tensor {
        let taken = match &mut self.mirrors {
            Some(mirrors) if !self.lives_there => mirrors[bucket].take(),
            _ => self.present[bucket].take(),
        };
        if self.own.is_some() {
            self.present[bucket] = None;
            self.mirrors.iter_mut().for_each(|mirrors| mirrors[bucket] = None);
        }
        taken.expect("a bucket is taken once")
    }

    /// Brings a bucket (back), on the host.
    pub fn put(&mut self, bucket: usize, parameters: Tensor) -> Result<(), Error> {
        let Some(mirrors) = self.mirrors.as_mut().filter(|_| !self.lives_there) else {
            self.present[bucket] = Some(parameters);
            return Ok(());
        };
        match &mut self.present[bucket] {
            Some(here) => drop(here.f_copy_(&parameters)?),
            here => *here = Some(parameters.f_to_device(self.device)?),
        }
        mirrors[bucket] = Some(parameters);
        Ok(())
    }

    /// Copies the host's parameters to the device; nothing to do where the device is the host.
    pub fn publish(&mut self) -> Result<(), Error> {
        let mirrors = self.mirrors.iter().flatten();
        for (here, mirror) in self.present.iter_mut().zip(mirrors) {
            if let (Some(here), Some(mirror)) = (here, mirror) {
                here.f_copy_(mirror)?;
            }
        }
        Ok(())
    }

    /// Replaces all that is kept by what `read(tensor name, its elements, destination)` gives, rounded to the compute kind
    /// as the optimizer rounds masters.
    pub fn fill<E: From<Error>>(
        &mut self,
        layout: &Layout,
        mut read: impl FnMut(&str, Range<usize>, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let compute = self.compute;
        let mut values = vec![0.0; CHUNK];
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let kept = self.own.as_ref().map_or(0..bucket.elements, |own| own[index].0.clone());
            // Where what is kept begins in the bucket is where its tensor begins.
            let (first, (parameters, _)) = (kept.start, self.own_mut(index, 0));
            for slot in &bucket.tensors {
                let range = slot.offset.max(kept.start)..(slot.offset + slot.elements()).min(kept.end);
                for begin in range.clone().step_by(CHUNK) {
                    let part = begin..range.end.min(begin + CHUNK);
                    let values = &mut values[..part.len()];
                    read(&slot.name, part.start - slot.offset..part.end - slot.offset, values)?;
                    let at = part.start - first..part.end - first;
                    match compute {
                        Kind::Float => view::elements_mut::<f32>(parameters)[at].copy_from_slice(values),
                        Kind::BFloat16 => state::round_all(values, &mut view::elements_mut(parameters)[at]),
                        _ => {
                            let wide = view::elements_mut::<f64>(parameters)[at].iter_mut();
                            wide.zip(values).for_each(|(to, x)| *to = f64::from(*x));
                        }
                    }
                }
            }
        }
        Ok(self.publish()?)
    }
}
