//! The kernels on real GPUs: compiled once for each, launched on libtorch's stream, so that they run in turn with its own.
#![allow(unsafe_code)]

use super::{cache, nvrtc, Argument, Grid};
use crate::library::Library;
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{c_void, CString};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// Why a GPU has no kernels.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Compiler(#[from] nvrtc::Error),
    #[error("the driver of GPU {index} refuses {what}: {source}")]
    Driver { index: usize, what: &'static str, source: result::DriverError },
}

/// The kernels of one GPU.
struct Module {
    context: sys::CUcontext,
    module: sys::CUmodule,
    /// By name, as they are first asked for.
    functions: Mutex<HashMap<String, Function>>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: handles of the driver, which may be used from any thread and live as long as the process.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Send for Module {}
// SAFETY: as above; the map is behind a lock.
unsafe impl Sync for Module {}

static MODULES: RwLock<Vec<Option<Arc<Module>>>> = RwLock::new(Vec::new());

fn module(index: usize) -> Option<Arc<Module>> {
    MODULES.read().unwrap_or_else(PoisonError::into_inner).get(index).cloned().flatten()
}

pub fn is_loaded(index: usize) -> bool {
    module(index).is_some()
}

/// Compiles the kernels for GPU `index` and loads them, unless that was done before.
pub fn load(index: usize) -> Result<(), Error> {
    if is_loaded(index) {
        return Ok(());
    }
    let failed = |what| move |source| Error::Driver { index, what, source };
    result::init().map_err(failed("to start"))?;
    let device = result::device::get(index as i32).map_err(failed("that number"))?;
    let attribute = |which| {
        // SAFETY: the device is the driver's own.
        unsafe { result::device::get_attribute(device, which) }.map_err(failed("to tell its architecture"))
    };
    let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let code = cache::compiled(&super::source(), &format!("sm_{major}{minor}"))?;
    // SAFETY: the device is the driver's own; its primary context, which libtorch uses too, is kept for good.
    let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("its context"))?;
    // SAFETY: a live context.
    unsafe { result::ctx::set_current(context) }.map_err(failed("its context"))?;
    // SAFETY: whole machine code for this GPU, which the driver copies.
    let module = unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(failed("the kernels"))?;
    let module = Module { context, module, functions: Mutex::default() };
    let mut modules = MODULES.write().unwrap_or_else(PoisonError::into_inner);
    if modules.len() <= index {
        modules.resize_with(index + 1, || None);
    }
    modules[index] = Some(Arc::new(module));
    Ok(())
}

impl Module {
    fn function(&self, name: &str) -> Result<Function, String> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let symbol = CString::new(name).map_err(|e| e.to_string())?;
        // SAFETY: the module is loaded for good.
        let found = unsafe { result::module::get_function(self.module, symbol) };
        let function = Function(found.map_err(|e| e.to_string())?);
        functions.insert(name.to_owned(), function);
        Ok(function)
    }
}

/// The stream on which libtorch works at the moment on this thread.
pub fn stream(index: usize) -> Result<sys::CUstream, String> {
    type Current = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;
    static CURRENT: OnceLock<Option<Current>> = OnceLock::new();
    let current = CURRENT.get_or_init(|| {
        let address = Library::process().symbol("aoti_torch_get_current_cuda_stream")?;
        // SAFETY: libtorch's stable C interface declares it with these types.
        Some(unsafe { std::mem::transmute::<*mut c_void, Current>(address) })
    });
    let current = current.ok_or("this libtorch does not tell its stream")?;
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes one pointer, of this frame.
    match unsafe { current(index as i32, &mut stream) } {
        0 => Ok(stream.cast()),
        _ => Err("libtorch has no stream".into()),
    }
}

pub(super) fn launch(index: usize, name: &str, grid: Grid, arguments: &[Argument]) -> Result<(), String> {
    let module = module(index).ok_or("the GPU's kernels are not loaded")?;
    let said = |e: result::DriverError| e.to_string();
    if result::ctx::get_current().map_err(said)? != Some(module.context) {
        // SAFETY: a live context.
        unsafe { result::ctx::set_current(module.context) }.map_err(said)?;
    }
    let function = module.function(name)?;
    let mut values: Vec<u64> = arguments.iter().map(|a| a.bits()).collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| std::ptr::from_mut(v).cast()).collect();
    let number = |n: usize| u32::try_from(n).map_err(|_| "more blocks than a GPU counts".to_owned());
    let (blocks, threads) = ((number(grid.x)?, number(grid.y)?, 1), (number(grid.threads)?, 1, 1));
    // SAFETY: the arguments are those of the kernel, in number and type: every launch of the program is carried out by the
    // emulator in tests, which compares them. Pointers are of tensors that the caller keeps until the launch is behind
    // their last use on the same stream, where libtorch's allocator frees in order too.
    unsafe {
        result::launch_kernel(function.0, blocks, threads, number(grid.shared)?, stream(index)?, &mut pointers)
            .map_err(said)
    }
}
